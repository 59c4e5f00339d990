// Light, dark, or as the system says; and the colours for what is drawn on a canvas.

import { byId, icon, put } from "./dom";

const ORDER = ["auto", "light", "dark"] as const;
type Theme = (typeof ORDER)[number];
const NAME = "kvist.theme";

export interface Colours {
  paper: string;
  ink: string;
  muted: string;
  line: string;
  free: string;
  used: string;
  shared: string;
  published: string;
  host: string;
  prefill: string;
}

const system = matchMedia("(prefers-color-scheme: dark)");
const listeners: (() => void)[] = [];
let current: Colours | null = null;

/** The page's colours as they are now. */
export function colours(): Colours {
  if (!current) {
    const style = getComputedStyle(document.documentElement);
    const read = (name: string) => style.getPropertyValue(`--${name}`).trim();
    current = {
      paper: read("paper"),
      ink: read("ink"),
      muted: read("muted"),
      line: read("line"),
      free: read("free"),
      used: read("used"),
      shared: read("shared"),
      published: read("published"),
      host: read("host"),
      prefill: read("prefill"),
    };
  }
  return current;
}

/** Call back whenever the colours have changed. */
export function onTheme(listener: () => void): void {
  listeners.push(listener);
}

export function startTheme(): void {
  const button = byId("theme");
  const show = (theme: Theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const label = theme === "auto" ? "Colours: as the system says" : `Colours: ${theme}`;
    button.setAttribute("aria-label", label);
    button.title = label;
    put(button, icon(theme));
    current = null;
    for (const listener of listeners) listener();
  };
  const stored = localStorage.getItem(NAME) as Theme | null;
  let theme: Theme = stored && ORDER.includes(stored) ? stored : "auto";
  show(theme);
  button.addEventListener("click", () => {
    theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length] ?? "auto";
    localStorage.setItem(NAME, theme);
    show(theme);
  });
  system.addEventListener("change", () => show(theme));
}
