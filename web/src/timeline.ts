// The timeline: a row for each request, from its arrival over the chunks of its prompt to its end.

import { h } from "./dom";
import { count, plural, seconds, shortId } from "./format";
import type { Live } from "./live";
import type { Life, Lives, Phase } from "./lives";
import { colours, onTheme } from "./theme";
import { hideTip, showTip } from "./tip";

const ROW = 18;
const BAR = 10;
const LABEL = 78;
const AXIS = 18;
const ROWS = 8;
const SPANS = [10, 30, 120];

export class Timeline {
  readonly element: HTMLElement;
  private readonly canvas: HTMLCanvasElement;
  private readonly picker: HTMLElement;
  private span = 30;
  private shown: Life[] = [];
  private at = -1;
  private quiet = false;

  constructor(
    private readonly live: Live,
    private readonly lives: Lives,
  ) {
    this.canvas = h("canvas", {
      class: "timeline",
      tabindex: 0,
      role: "application",
      "aria-roledescription": "timeline",
      "aria-label": "Requests over time. Arrow keys go from request to request.",
      onpointermove: (event: PointerEvent) =>
        this.point(Math.floor((event.offsetY - AXIS) / ROW), event.clientX, event.clientY),
      onpointerleave: () => this.point(-1, 0, 0),
      onblur: () => this.point(-1, 0, 0),
      onkeydown: (event: KeyboardEvent) => this.walk(event),
    });
    this.picker = h("div", { class: "spans", role: "group", "aria-label": "Length of the timeline" });
    for (const span of SPANS) {
      this.picker.append(
        h(
          "button",
          {
            type: "button",
            "aria-pressed": String(span === this.span),
            onclick: () => this.choose(span),
          },
          span < 60 ? `${span} s` : `${span / 60} min`,
        ),
      );
    }
    this.element = h("div", { class: "timeline-box" }, this.canvas);
    new ResizeObserver(() => this.draw()).observe(this.element);
    onTheme(() => this.draw());
    // Ten pictures a second are smooth enough for what moves a few pixels in one.
    setInterval(() => {
      if (!document.hidden && !this.quiet) this.draw();
    }, 100);
  }

  get spanPicker(): HTMLElement {
    return this.picker;
  }

  wake(): void {
    this.quiet = false;
  }

  private choose(span: number): void {
    this.span = span;
    [...this.picker.children].forEach((button, i) =>
      button.setAttribute("aria-pressed", String(SPANS[i] === span)),
    );
    this.quiet = false;
    this.draw();
  }

  private draw(): void {
    const width = this.element.clientWidth;
    if (!width) return;
    const now = this.live.now();
    const from = now - this.span;
    const alive = [...this.lives.all.values()].filter((life) => (life.ended ?? now) > from);
    this.shown = alive.slice(-ROWS).reverse();
    this.quiet = this.shown.length === 0;
    const height = AXIS + ROWS * ROW;
    const scale = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
      this.canvas.style.width = `${width}px`;
      this.canvas.style.height = `${height}px`;
    }
    const context = this.canvas.getContext("2d");
    if (!context) return;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    const x = (time: number) => LABEL + ((time - from) / this.span) * (width - LABEL - 2);
    this.drawAxis(context, x, now, height);
    this.shown.forEach((life, row) => this.drawLife(context, x, life, row, now, from));
    if (!this.shown.length) {
      context.fillStyle = colours().muted;
      context.font = font(context, 13, "italic");
      context.textAlign = "center";
      context.fillText("No request in this time.", LABEL + (width - LABEL) / 2, AXIS + ROW * 2.5);
    }
  }

  private drawAxis(context: CanvasRenderingContext2D, x: (t: number) => number, now: number, height: number): void {
    const palette = colours();
    const step = this.span / 5;
    context.font = font(context, 11);
    context.textBaseline = "alphabetic";
    context.lineWidth = 1;
    for (let back = 0; back <= this.span; back += step) {
      const at = Math.round(x(now - back)) - 0.5;
      context.strokeStyle = palette.line;
      context.beginPath();
      context.moveTo(at, AXIS - 4);
      context.lineTo(at, height);
      context.stroke();
      context.fillStyle = palette.muted;
      context.textAlign = back ? "center" : "right";
      if (back < this.span) context.fillText(back ? `−${back} s` : "now", at, 10);
    }
  }

  private drawLife(
    context: CanvasRenderingContext2D,
    x: (t: number) => number,
    life: Life,
    row: number,
    now: number,
    from: number,
  ): void {
    const palette = colours();
    const top = AXIS + row * ROW + (ROW - BAR) / 2;
    context.font = font(context, 12);
    context.fillStyle = row === this.at ? palette.ink : palette.muted;
    context.textAlign = "left";
    context.textBaseline = "middle";
    const name = shortId(life.id) + (life.sample ? `/${life.sample}` : "");
    context.fillText(name, 0, top + BAR / 2 + 0.5, LABEL - 8);
    for (const span of life.spans) {
      const end = span.to ?? now;
      if (end < from) continue;
      const left = Math.max(x(span.from), LABEL);
      const right = Math.max(x(end), left + 1.5);
      bar(context, span.phase, left, right, top);
    }
    if (life.ended !== null && life.ended > from) {
      const at = x(life.ended);
      const good = life.reason === "stop" || life.reason === "length";
      context.fillStyle = good ? palette.used : palette.shared;
      context.beginPath();
      context.arc(at, top + BAR / 2, 3, 0, 7);
      if (good) context.fill();
      else {
        context.lineWidth = 1.5;
        context.strokeStyle = palette.shared;
        context.stroke();
      }
    }
    if (row === this.at) {
      context.strokeStyle = palette.ink;
      context.lineWidth = 1;
      context.strokeRect(LABEL - 2.5, top - 3.5, x(now) - LABEL + 3, BAR + 7);
    }
  }

  private walk(event: KeyboardEvent): void {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") this.point(-1, 0, 0);
    if (step === undefined || !this.shown.length) return;
    event.preventDefault();
    const row = Math.min(Math.max(this.at + step, 0), this.shown.length - 1);
    const rect = this.canvas.getBoundingClientRect();
    this.point(row, rect.left + rect.width / 2, rect.top + AXIS + row * ROW);
  }

  private point(row: number, x: number, y: number): void {
    const life = this.shown[row];
    this.at = life ? row : -1;
    this.quiet = false;
    if (life) showTip(this.canvas, x, y, ...this.describe(life));
    else hideTip(this.canvas);
  }

  private describe(life: Life): HTMLElement[] {
    const row = this.live.rows.running.find(([id, sample]) => id === life.id && sample === life.sample);
    const prompt = row ? row[2] : life.cached + life.computed;
    const output = row ? row[3] : Math.max(0, life.total - prompt);
    const until = life.ended ?? this.live.now();
    const notes: string[] = [];
    const queue = life.spans.find((span) => span.phase === "queue");
    if (queue) notes.push(`waited ${seconds((queue.to ?? until) - queue.from)}`);
    if (life.firstToken !== null) {
      if (life.arrived !== null) notes.push(`first token after ${seconds(life.firstToken - life.arrived)}`);
      const took = until - life.firstToken;
      const speed = output > 1 && took > 0 ? ` at ${count((output - 1) / took)} a second` : "";
      notes.push(`${plural(output, "token")}${speed}`);
    }
    if (life.preemptions) notes.push(`preempted ${plural(life.preemptions, "time")}`);
    const chunks = life.spans.filter((span) => span.phase === "prefill" && span.tokens).length;
    const parts = [h("p", {}, h("b", {}, shortId(life.id)), ` ${life.reason || "goes on"}`)];
    if (prompt) {
      const from = life.cached ? `${count(life.cached)} of ${count(prompt)} prompt tokens from the cache` : `${plural(prompt, "prompt token")}, none cached`;
      notes.unshift(`${from}, ${plural(chunks, "chunk")}`);
    }
    parts.push(h("p", { class: "notes" }, notes.join(" · ")));
    return parts;
  }
}

function bar(context: CanvasRenderingContext2D, phase: Phase, left: number, right: number, top: number): void {
  const palette = colours();
  const middle = top + BAR / 2;
  if (phase === "prefill") {
    context.fillStyle = palette.prefill;
    context.fillRect(left, top, Math.max(1, right - left - 1), BAR);
  } else if (phase === "decode") {
    context.fillStyle = palette.used;
    context.fillRect(left, middle - 2, right - left, 4);
  } else {
    context.strokeStyle = phase === "queue" ? palette.muted : palette.shared;
    context.lineWidth = phase === "queue" ? 1 : 2;
    context.setLineDash(phase === "queue" ? [1, 3] : [4, 3]);
    context.beginPath();
    context.moveTo(left, middle);
    context.lineTo(right, middle);
    context.stroke();
    context.setLineDash([]);
  }
}

function font(context: CanvasRenderingContext2D, size: number, style = ""): string {
  return `${style} ${size}px ${getComputedStyle(context.canvas).fontFamily}`.trim();
}
