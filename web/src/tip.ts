// One small card that explains what the pointer, or the keyboard's cursor, is on.

import { append, h, type Child } from "./dom";

const card = h("div", { class: "tip", role: "status", hidden: true });
let shownBy: Element | null = null;

export function startTip(): void {
  document.body.append(card);
  // Only what moves the card's place takes it away: an answer that scrolls does not close the map's.
  const moved = (event: Event) => (event.target as Node).contains(shownBy);
  addEventListener("scroll", (event) => moved(event) && close(), { capture: true, passive: true });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
  });
}

/** Show the card beside a place of the window, which is in `owner`. */
export function showTip(owner: Element, x: number, y: number, ...children: Child[]): void {
  shownBy = owner;
  card.replaceChildren();
  append(card, children);
  card.hidden = false;
  const { width, height } = card.getBoundingClientRect();
  const gap = 14;
  const left = Math.min(Math.max(8, x - width / 2), innerWidth - width - 8);
  const above = y - height - gap;
  card.style.left = `${left}px`;
  card.style.top = `${above > 8 ? above : Math.min(y + gap, innerHeight - height - 8)}px`;
}

/** Whether the card is this element's. */
export function hasTip(owner: Element): boolean {
  return shownBy === owner;
}

/** Hide the card if it is this element's. */
export function hideTip(owner: Element): void {
  if (hasTip(owner)) close();
}

function close(): void {
  shownBy = null;
  card.hidden = true;
}
