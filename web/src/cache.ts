// The right side of the page: puts the map, the timeline, the twig and the plots together.

import { BlockMap } from "./blockmap";
import { byId, h, put } from "./dom";
import { count, percent, plural, rate, seconds } from "./format";
import { tally, type Live, type News } from "./live";
import { Lives } from "./lives";
import { Plot, Rate, type Point } from "./plots";
import { Timeline } from "./timeline";
import { Tree } from "./tree";

export class CacheView {
  private readonly lives = new Lives();
  private readonly maps = h("div", { class: "maps" });
  private readonly legend = h("ul", { class: "legend", "aria-label": "Blocks by what they are" });
  private readonly headline = h("p", { class: "headline" });
  private readonly timeline: Timeline;
  private readonly tree: Tree;
  private readonly pools: BlockMap[] = [];
  private readonly hosts: (BlockMap | null)[] = [];
  private readonly speed = new Plot("Answers written", "used", "line");
  private readonly prompts = new Plot("Prompts read", "prefill", "line");
  private readonly first = new Plot("First token after", "shared", "dots");
  private readonly hits = new Plot("Found in the cache", "published", "line", 1);
  private readonly written = new Rate();
  private readonly computed = new Rate();
  private readonly hitRates: Point[] = [];
  private queried: { queried: number; hit: number }[] = [];
  private told = 0; // when there was news

  constructor(private readonly live: Live) {
    this.timeline = new Timeline(live, this.lives);
    this.tree = new Tree(live, (blocks) => this.pools[0]?.mark(blocks));
    put(
      byId("cache"),
      this.headline,
      sheet("Blocks", this.legend, this.maps),
      sheet("Prefixes", h("p", { class: "aside" }, "Where texts part, the twig parts."), this.tree.element),
      sheet("Requests", h("div", { class: "aside" }, phases(), this.timeline.spanPicker), this.timeline.element),
      h("div", { class: "plots" }, this.speed.element, this.prompts.element, this.first.element, this.hits.element),
    );
    // An engine at rest sends nothing, but time goes on.
    setInterval(() => {
      if (!document.hidden && performance.now() - this.told > 700) this.plot(live.now());
    }, 500);
  }

  take(news: News): void {
    if (news.whole) this.begin();
    for (const mark of news.marks) this.lives.add(mark);
    if (news.marks.length) this.timeline.wake();
    this.live.groups.forEach((group, i) => {
      this.pools[i]?.show(group.map);
      this.hosts[i]?.show(group.host);
    });
    for (const { group, host, start, count: length } of news.changed) {
      (host ? this.hosts : this.pools)[group]?.light(start, length);
    }
    if (news.tree) this.tree.draw();
    else if (news.changed.length) this.tree.colour();
    this.tell();
    this.told = performance.now();
    if (this.live.values) this.plot(this.live.values.now);
  }

  private begin(): void {
    this.lives.clear();
    this.written.clear();
    this.computed.clear();
    this.hitRates.length = 0;
    this.queried = [];
    this.pools.length = this.hosts.length = 0;
    const several = this.live.groups.length > 1;
    const parts: HTMLElement[] = [];
    this.live.groups.forEach((group, i) => {
      const kind = group.window === null ? "All layers that see everything" : `Layers that see ${plural(group.window, "token")}${group.sinks ? ` and ${plural(group.sinks, "sink")}` : ""}`;
      const pool = new BlockMap({ label: `Blocks of the pool${several ? `, ${kind}` : ""}`, host: false, group: i, height: several ? 110 : 176 });
      this.pools.push(pool);
      if (several) parts.push(h("p", { class: "caption" }, kind));
      parts.push(h("div", { class: "map-box" }, pool.canvas));
      if (group.host.length) {
        const host = new BlockMap({ label: "Blocks of the host tier", host: true, group: i, height: 66 });
        this.hosts.push(host);
        parts.push(h("p", { class: "caption" }, "Host memory"), h("div", { class: "map-box" }, host.canvas));
      } else this.hosts.push(null);
    });
    put(this.maps, ...parts);
  }

  private tell(): void {
    const { values, groups } = this.live;
    if (!values) return;
    const sums = { free: 0, used: 0, shared: 0, published: 0 };
    let host = 0;
    let hostRoom = 0;
    for (const group of groups) {
      const one = tally(group);
      for (const key of ["free", "used", "shared", "published"] as const) sums[key] += one[key];
      host += group.host.reduce((n, state) => n + Math.min(state, 1), 0);
      hostRoom += group.host.length;
    }
    const total = sums.free + sums.used + sums.shared + sums.published;
    const entry = (name: string, label: string, n: number) =>
      h("li", { class: name }, h("i", { "aria-hidden": "true" }), h("b", {}, count(n)), ` ${label}`);
    put(
      this.legend,
      entry("used", "used", sums.used),
      entry("shared", "shared", sums.shared),
      entry("published", "published", sums.published),
      entry("free", "free", sums.free),
      hostRoom > 0 && entry("host", "in host memory", host),
    );
    const kept = values.hit + values.host_hit + values.fork;
    const saving = values.queried ? `${percent(kept / values.queried)} of all prompt tokens were already there.` : "Nothing has been asked yet.";
    const busy = values.running
      ? `${plural(values.running, "request")} running${values.waiting ? `, ${count(values.waiting)} waiting` : ""}.`
      : "At rest.";
    put(this.headline, h("b", {}, percent(total ? 1 - sums.free / total : 0)), ` of ${plural(total, "block")} hold something. ${saving} ${busy}`);
  }

  private plot(now: number): void {
    const { values } = this.live;
    if (!values) return;
    const written = this.written.add(now, values.output);
    const computed = this.computed.add(now, Math.max(0, values.computed - values.output));
    this.speed.show(now, this.written.points, rate(written), "tokens/s");
    this.prompts.show(now, this.computed.points, rate(computed), "tokens/s");
    const firsts = this.lives.firstTokens.map((p) => ({ at: p.at, value: p.after }));
    const latest = firsts.at(-1);
    this.first.show(now, firsts, latest ? seconds(latest.value) : "–", latest ? "the last one" : "");
    // The rate of what was asked lately: since some queries ago, not since the start.
    const hit = values.hit + values.host_hit + values.fork;
    const before = this.queried.at(-1);
    if (!before || before.queried !== values.queried) {
      this.queried.push({ queried: values.queried, hit });
      if (this.queried.length > 12) this.queried.shift();
    }
    const base = this.queried[0];
    const asked = base ? values.queried - base.queried : 0;
    const share = asked && base ? (hit - base.hit) / asked : values.queried ? hit / values.queried : 0;
    this.hitRates.push({ at: now, value: share });
    if (this.hitRates.length > 600) this.hitRates.shift();
    this.hits.show(now, this.hitRates, percent(share), "of late");
  }
}

function sheet(title: string, aside: HTMLElement, body: HTMLElement): HTMLElement {
  return h("section", { class: "sheet", "aria-label": title }, h("header", {}, h("h2", {}, title), aside), body);
}

function phases(): HTMLElement {
  const entry = (name: string, label: string) => h("li", { class: name }, h("i", { "aria-hidden": "true" }), label);
  return h(
    "ul",
    { class: "phases" },
    entry("queue", "waits"),
    entry("prefill", "reads a chunk"),
    entry("decode", "writes"),
    entry("preempted", "gave way"),
  );
}
