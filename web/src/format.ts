// Numbers as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (n: number): string => whole.format(n);

export function seconds(s: number): string {
  if (s < 0.0095) return `${(s * 1000).toFixed(1)} ms`;
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  return s < 10 ? `${s.toFixed(2)} s` : `${s.toFixed(1)} s`;
}

export const percent = (share: number): string =>
  `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}\u00a0%`;

export const rate = (n: number): string => (n < 9.95 ? n.toFixed(1) : count(n));

export const plural = (n: number, one: string, many = `${one}s`): string =>
  `${count(n)} ${n === 1 ? one : many}`;

/** The telling end of a long request id. */
export const shortId = (id: string): string => (id.length > 12 ? `…\u2060${id.slice(-8)}` : id);

/** Text on one line, with its white space to be seen. */
export const oneLine = (text: string): string => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
