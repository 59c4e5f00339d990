// An answer token by token, each on a ground that is the warmer the less likely it was. Pointer or
// arrow keys show what else might have come.

import { h } from "./dom";
import { oneLine, percent } from "./format";
import { hideTip, showTip } from "./tip";

export interface TokenLogprob {
  token: string;
  logprob: number;
  bytes?: number[] | null;
  top_logprobs?: { token: string; logprob: number }[];
}

export class Tokens {
  readonly element: HTMLElement;
  private readonly entries: TokenLogprob[] = [];
  private decoder = new TextDecoder();
  private at = -1;

  constructor() {
    this.element = h("div", {
      class: "token-text",
      tabindex: 0,
      role: "group",
      "aria-label": "Answer by token. Arrow keys go from token to token.",
      onpointerover: (event: PointerEvent) => this.point(event.target as HTMLElement),
      onpointerleave: () => this.moveTo(-1),
      onblur: () => this.moveTo(-1),
      onkeydown: (event: KeyboardEvent) => this.walk(event),
    });
  }

  get length(): number {
    return this.entries.length;
  }

  add(tokens: TokenLogprob[]): void {
    for (const entry of tokens) {
      this.entries.push(entry);
      // Several tokens may make one character: it stands with the last of them.
      const text = entry.bytes
        ? this.decoder.decode(Uint8Array.from(entry.bytes), { stream: true })
        : entry.token;
      const span = h("span", { "data-at": this.entries.length - 1 }, text);
      const doubt = Math.round(100 * (1 - Math.exp(entry.logprob)));
      span.style.setProperty("--doubt", `${doubt}%`);
      this.element.append(span);
    }
  }

  private point(target: HTMLElement): void {
    if (target.dataset.at !== undefined) this.moveTo(Number(target.dataset.at));
  }

  private walk(event: KeyboardEvent): void {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") this.moveTo(-1);
    if (step === undefined || !this.entries.length) return;
    event.preventDefault();
    this.moveTo(Math.min(Math.max(this.at + step, 0), this.entries.length - 1));
  }

  private moveTo(at: number): void {
    this.element.children[this.at]?.classList.remove("here");
    this.at = at;
    const entry = this.entries[at];
    const span = this.element.children[at];
    if (!entry || !span) {
      hideTip(this.element);
      return;
    }
    span.classList.add("here");
    const rect = span.getBoundingClientRect();
    const row = (token: string, logprob: number) => {
      const bar = h("i", { "aria-hidden": "true" });
      bar.style.width = `${Math.round(100 * Math.exp(logprob))}%`;
      const own = token === entry.token;
      return h(
        "tr",
        { class: own ? "own" : null },
        h("th", { scope: "row" }, oneLine(token) || "∅"),
        h("td", {}, percent(Math.exp(logprob))),
        h("td", { class: "bar" }, bar),
      );
    };
    const top = entry.top_logprobs ?? [];
    const rows = top.map((other) => row(other.token, other.logprob));
    if (!top.some((other) => other.token === entry.token)) rows.push(row(entry.token, entry.logprob));
    showTip(this.element, rect.left + rect.width / 2, rect.top, h("table", { class: "likely" }, h("tbody", {}, ...rows)));
  }
}
