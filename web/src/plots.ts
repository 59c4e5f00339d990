// Small plots: one number to read, and a line that says where it came from.

import { h, put } from "./dom";
import { colours, onTheme, type Colours } from "./theme";

const SECONDS = 120;

export interface Point {
  at: number;
  value: number;
}

export class Plot {
  readonly element: HTMLElement;
  private readonly number = h("span", { class: "number" }, "–");
  private readonly unit = h("span", { class: "unit" });
  private readonly canvas = h("canvas", { "aria-hidden": "true" });
  private points: Point[] = [];
  private now = 0;

  constructor(
    title: string,
    private readonly colour: keyof Colours,
    private readonly kind: "line" | "dots",
    private readonly most?: number,
  ) {
    this.element = h("figure", { class: "plot" }, h("figcaption", {}, title), h("p", {}, this.number, this.unit), this.canvas);
    new ResizeObserver(() => this.draw()).observe(this.element);
    onTheme(() => this.draw());
  }

  show(now: number, points: Point[], number: string, unit: string): void {
    this.now = now;
    this.points = points;
    put(this.number, number);
    put(this.unit, unit);
    this.draw();
  }

  private draw(): void {
    const width = this.element.clientWidth;
    const height = 38;
    if (!width) return;
    const scale = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = height * scale;
      this.canvas.style.width = `${width}px`;
      this.canvas.style.height = `${height}px`;
    }
    const context = this.canvas.getContext("2d");
    if (!context) return;
    const palette = colours();
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    context.strokeStyle = palette.line;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(0, height - 0.5);
    context.lineTo(width, height - 0.5);
    context.stroke();
    const points = this.points.filter((p) => p.at > this.now - SECONDS);
    if (!points.length) return;
    const top = this.most ?? (Math.max(...points.map((p) => p.value)) * 1.1 || 1);
    const x = (p: Point) => width - 3 - ((this.now - p.at) / SECONDS) * (width - 6);
    const y = (p: Point) => height - 2 - (Math.min(p.value, top) / top) * (height - 6);
    context.strokeStyle = context.fillStyle = palette[this.colour];
    if (this.kind === "dots") {
      for (const p of points) {
        context.beginPath();
        context.arc(x(p), y(p), 2.2, 0, 7);
        context.fill();
      }
      return;
    }
    context.lineWidth = 1.6;
    context.lineJoin = "round";
    context.beginPath();
    points.forEach((p, i) => (i ? context.lineTo(x(p), y(p)) : context.moveTo(x(p), y(p))));
    context.stroke();
    context.globalAlpha = 0.14;
    context.lineTo(x(points.at(-1)!), height - 1);
    context.lineTo(x(points[0]!), height - 1);
    context.fill();
    context.globalAlpha = 1;
  }
}

/** A counter's growth a second, smoothed over about a second. */
export class Rate {
  readonly points: Point[] = [];
  private last: Point | null = null;
  private smooth = 0;

  clear(): void {
    this.points.length = 0;
    this.last = null;
    this.smooth = 0;
  }

  add(at: number, value: number): number {
    const { last } = this;
    if (last && at > last.at) {
      const passed = at - last.at;
      const now = Math.max(0, value - last.value) / passed;
      const share = 1 - Math.exp(-passed / 0.8);
      this.smooth += share * (now - this.smooth);
      if (this.smooth < 0.05) this.smooth = 0;
      this.points.push({ at, value: this.smooth });
      if (this.points.length > 600) this.points.shift();
    }
    this.last = { at, value };
    return this.smooth;
  }
}
