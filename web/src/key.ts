// Asks for an API key when the server demands one; the tab keeps it, nothing else does.

import { h } from "./dom";

/** The key that the person gave, or null. */
export function askForKey(): Promise<string | null> {
  return new Promise((resolve) => {
    const field = h("input", { type: "password", autocomplete: "off", spellcheck: "false", "aria-label": "API key", required: true });
    const dialog = h(
      "dialog",
      { class: "key", "aria-labelledby": "key-title", onclose: () => finish(null) },
      h(
        "form",
        {
          method: "dialog",
          onsubmit: (event: Event) => {
            event.preventDefault();
            finish(field.value.trim() || null);
          },
        },
        h("h2", { id: "key-title" }, "This server wants a key"),
        h("p", {}, "It stays in this tab and goes to this server only."),
        field,
        h(
          "div",
          { class: "acts" },
          h("button", { type: "button", class: "text", onclick: () => finish(null) }, "Not now"),
          h("button", { type: "submit", class: "solid" }, "Use it"),
        ),
      ),
    );
    let done = false;
    const finish = (key: string | null) => {
      if (done) return;
      done = true;
      dialog.remove();
      resolve(key);
    };
    document.body.append(dialog);
    dialog.showModal();
  });
}
