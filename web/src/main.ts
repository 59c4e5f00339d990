// Starts the page: the chat on one side, the cache on the other.

import { onKeyNeeded } from "./api";
import { CacheView } from "./cache";
import { Chat } from "./chat";
import { byId, put } from "./dom";
import { askForKey } from "./key";
import { Live } from "./live";
import { startTheme } from "./theme";
import { startTip } from "./tip";

onKeyNeeded(askForKey);
startTheme();
startTip();

const chat = new Chat();
const live = new Live();
const cache = new CacheView(live);

live.onNews = (news) => {
  cache.take(news);
  if (news.whole) void meet();
};
live.onLink = (state) => {
  const link = byId("link");
  link.dataset.state = state;
  put(link, { connecting: "connecting", live: "live", lost: "connection lost, trying again" }[state]);
};

async function meet(): Promise<void> {
  try {
    await chat.meet();
  } catch {
    put(byId("model"), live.model);
  }
}

for (const button of document.querySelectorAll<HTMLButtonElement>(".views button")) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.view;
    for (const other of document.querySelectorAll(".views button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
  });
}

live.start();
