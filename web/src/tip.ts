// One small card that explains what the pointer, or the keyboard's cursor, is on.

import { append, h, type Child } from "./dom";

const card = h("div", { class: "tip", role: "status", hidden: true });

export function startTip(): void {
  document.body.append(card);
  addEventListener("scroll", hideTip, { capture: true, passive: true });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
  });
}

/** Show the card beside a place of the window. */
export function showTip(x: number, y: number, ...children: Child[]): void {
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

export function hideTip(): void {
  card.hidden = true;
}
