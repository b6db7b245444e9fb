/**
 * Drawings of the lab: a network and what was measured in it, as SVG and, the network alone, as
 * text. A picture needs no script, font or other file; it is readable on light and dark, and
 * without colour.
 *
 * @module
 */

// ─── What is drawn ───────────────────────────────────────────────────────────────────────────────

/** Hosts in a row. */
export interface Topology {
  readonly hosts: readonly { readonly name: string; readonly note?: string }[];
  /** Link n is between host n and host n + 1. */
  readonly links: readonly Link[];
  /** The traffic, in one line. */
  readonly traffic: string;
}

/** A link between two hosts. */
export interface Link {
  /** The devices at its ends. */
  readonly left: string;
  readonly right: string;
  /** Above the link. */
  readonly label?: string;
  /** Below the link. */
  readonly note?: string;
  /** The end at which packets queue. */
  readonly queue?: "left" | "right";
  /** The end at which packets are dropped. */
  readonly drop?: "left" | "right";
}

/** A colour, a shape of dots and the dashes of lines: the same for the same thing in each picture. */
export type Style = 0 | 1 | 2 | 3;

/** A value of one request; `null` if it got no reply. */
export type Value = number | null;

/** Requests of one kind, one strip per kind, on a log axis of milliseconds. */
export interface Strips {
  readonly kind: "strips";
  readonly title: string;
  /** What the axis shows. */
  readonly axis: string;
  readonly strips: readonly {
    readonly label: string;
    readonly style: Style;
    readonly values: readonly Value[];
    readonly median: number;
  }[];
}

/** Values over time, in seconds. */
export interface Course {
  readonly kind: "course";
  readonly title: string;
  /** What the axes show. */
  readonly axes: { readonly x: string; readonly y: string };
  /** A log axis of milliseconds, or a linear one of Mbit/s. */
  readonly unit: "ms" | "Mbit/s";
  readonly from: number;
  readonly to: number;
  readonly shaded?: { readonly from: number; readonly to: number; readonly label: string };
  readonly series: readonly Series[];
}

/** Values of one kind over time. */
export interface Series {
  readonly label: string;
  readonly style: Style;
  readonly points: readonly (readonly [seconds: number, value: Value])[];
  /** Whether steps are drawn instead of dots: each value holds from the second before. */
  readonly isLine?: boolean;
  /** Medians, each from a second to a second. */
  readonly medians?: readonly (readonly [from: number, to: number, value: number])[];
}

/** The 64 code points, eight in a row; `null` is unchanged. */
export interface Grid {
  readonly kind: "grid";
  readonly title: string;
  readonly cells: readonly { readonly label: string; readonly became: string | null }[];
}

/** Lines of text, such as a program's output. */
export interface Lines {
  readonly kind: "lines";
  readonly title: string;
  readonly lines: readonly string[];
}

/** A picture: a network, and panels below it. */
export interface Picture {
  readonly title: string;
  readonly description: string;
  readonly topology: Topology;
  readonly panels: readonly (Strips | Course | Grid | Lines)[];
  /** What abbreviations stand for, in one line. */
  readonly words?: string;
}

// ─── The network as text ─────────────────────────────────────────────────────────────────────────

/** Draws a network in lines of at most 80 columns. */
export function drawTopology({ hosts, links, traffic }: Topology): string {
  const rows = ["", "", "", "", ""];
  const pad = (width: number) => rows.forEach((row, at) => rows[at] = row.padEnd(width));
  const add = (...cells: string[]) => {
    pad(Math.max(...rows.map(({ length }) => length)));
    cells.forEach((cell, at) => rows[at] += cell);
  };
  for (const [at, { name, note = "" }] of hosts.entries()) {
    const edge = "─".repeat(name.length + 2);
    const left = at > 0 ? "┤" : "│", right = at < links.length ? "├" : "│";
    add("", `┌${edge}┐`, `${left} ${name} ${right}`, `└${edge}┘`, note);
    if (at === links.length) break;
    const { left: near, right: far, label = "", note: under = "", queue, drop } = links[at];
    const sign = queue !== undefined ? "▮▮▮▮" : drop !== undefined ? "✕─" : "";
    const isLeft = (queue ?? drop) === "left";
    const from = `─${near}─${isLeft ? sign : ""}`, to = `${isLeft ? "" : sign}─${far}─`;
    const width = Math.max(label.length + 2, under.length + 2, from.length + to.length + 2);
    add("", ` ${label}`, from + to.padStart(width - from.length, "─"), ` ${under}`);
  }
  return [...rows.filter((row) => row.trim() !== ""), traffic].map((row) => `  ${row.trimEnd()}\n`)
    .join("");
}

// ─── SVG ─────────────────────────────────────────────────────────────────────────────────────────

const WIDTH = 640, LEFT = 76, RIGHT = WIDTH - 16;

const STYLE = `
    .paper { fill: #fff } .box { fill: #f6f8fa; stroke: #59636e }
    text { fill: #1f2328; font: 15px system-ui, "DejaVu Sans", sans-serif }
    .title { font-weight: 600 } .small { font-size: 14px; fill: #59636e }
    .code, .device { font: 12px ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre }
    .device { fill: #59636e }
    .middle { text-anchor: middle } .end { text-anchor: end }
    .wire { stroke: #59636e; stroke-width: 2 } .grid { stroke: #d1d9e0 } .minor { stroke: #eaeef2 }
    .shade { fill: #fff1c2 } .edge { stroke: #9a6700; stroke-dasharray: 2 3 }
    .halo { stroke: #fff; stroke-width: 5; stroke-opacity: .6 }
    .s0 { fill: #0969da; stroke: #0969da } .s1 { fill: #bc4c00; stroke: #bc4c00 }
    .s2 { fill: #1a7f37; stroke: #1a7f37 } .s3 { fill: #8250df; stroke: #8250df }
    .dot { fill-opacity: .45 } .line { stroke-width: 2 } .median { stroke-width: 3 }
    @media (prefers-color-scheme: dark) {
      .paper { fill: #0d1117 } .box { fill: #151b23; stroke: #9198a1 }
      text { fill: #f0f6fc } .small, .device { fill: #b1bac4 }
      .wire { stroke: #9198a1 } .grid { stroke: #3d444d } .minor { stroke: #21262d }
      .shade { fill: #3a2d08 } .edge { stroke: #d29922 } .halo { stroke: #0d1117 }
      .s0 { fill: #58a6ff; stroke: #58a6ff } .s1 { fill: #f0883e; stroke: #f0883e }
      .s2 { fill: #3fb950; stroke: #3fb950 } .s3 { fill: #bc8cff; stroke: #bc8cff }
    }
    .line { fill: none }
    @media (max-width: 500px) { text { font-size: 18px } .small, .title { font-size: 17px } .device { font-size: 14px } }
  `;

/** Draws a picture as a complete SVG document. */
export function drawSvg({ title, description, topology, panels, words }: Picture): string {
  const canvas = new Canvas();
  canvas.text(16, 26, title, "title");
  canvas.y = 44;
  network(canvas, topology);
  for (const panel of panels) {
    canvas.y += 30;
    canvas.text(16, canvas.y, panel.title, "title");
    canvas.y += 12;
    if (panel.kind === "strips") strips(canvas, panel);
    else if (panel.kind === "course") course(canvas, panel);
    else if (panel.kind === "grid") grid(canvas, panel);
    else lines(canvas, panel);
  }
  if (words !== undefined) canvas.text(16, canvas.y += 28, words, "small");
  const height = Math.ceil(canvas.y + 16);
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${height}" viewBox="0 0 ${WIDTH} ${height}" role="img">
  <title>${escape(title)}</title>
  <desc>${escape(description)}</desc>
  <style>${STYLE}</style>
  <rect class="paper" width="${WIDTH}" height="${height}" rx="6"/>
${canvas.elements.map((element) => `  ${element}\n`).join("")}</svg>
`;
}

/** Escapes text for SVG and HTML. */
export function escape(text: string): string {
  return text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
}

/** Elements, and how far down they reach. */
class Canvas {
  readonly elements: string[] = [];
  y = 0;

  text(x: number, y: number, text: string, style = ""): void {
    const name = style === "" ? "" : ` class="${style}"`;
    this.elements.push(`<text x="${fixed(x)}" y="${fixed(y)}"${name}>${escape(text)}</text>`);
  }

  line(x1: number, y1: number, x2: number, y2: number, style: string): void {
    const ends = `x1="${fixed(x1)}" y1="${fixed(y1)}" x2="${fixed(x2)}" y2="${fixed(y2)}"`;
    this.elements.push(`<line ${ends} class="${style}"/>`);
  }

  box(x: number, y: number, width: number, height: number, style: string, radius = 0): void {
    const place = `x="${fixed(x)}" y="${fixed(y)}" width="${fixed(width)}" height="${
      fixed(height)
    }"`;
    this.elements.push(`<rect ${place} rx="${radius}" class="${style}"/>`);
  }

  path(d: string, style: string): void {
    this.elements.push(`<path d="${d}" class="${style}"/>`);
  }

  /** A line of a series: its dashes differ from those of others, without colour too. */
  polyline(
    points: readonly (readonly [x: number, y: number])[],
    style: Style,
    isAlone: boolean,
  ): void {
    const dashes = isAlone ? "none" : ["none", "7 4", "2 4", "9 3 2 3"][style];
    const joined = points.map(([x, y]) => `${fixed(x)},${fixed(y)}`).join(" ");
    this.elements.push(
      `<polyline points="${joined}" class="s${style} line" stroke-dasharray="${dashes}"/>`,
    );
  }

  /** A request. */
  dot(x: number, y: number, style: Style): void {
    this.path(`M${fixed(x)} ${fixed(y)}${SHAPES[style]}`, `s${style} dot`);
  }

  /** A request without a reply. */
  cross(x: number, y: number, style: Style): void {
    this.path(`M${fixed(x)} ${fixed(y)}m-4-4l8 8m0-8l-8 8`, `s${style} line failed`);
  }

  /** A median. */
  bar(x1: number, y1: number, x2: number, y2: number, style: Style): void {
    this.line(x1, y1, x2, y2, "halo");
    this.line(x1, y1, x2, y2, `s${style} median`);
  }
}

const SHAPES = [
  "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z", // a circle
  "m0-4.5l4.5 8h-9z", // a triangle
  "m-3.2-3.2h6.4v6.4h-6.4z", // a square
  "m0-4.8l4.8 4.8l-4.8 4.8l-4.8-4.8z", // a diamond
];

function fixed(value: number): string {
  return String(Math.round(value * 10) / 10);
}

function network(canvas: Canvas, { hosts, links, traffic }: Topology): void {
  const top = canvas.y + 8, height = 36, middle = top + height / 2;
  const box = hosts.length > 3 ? 84 : 104;
  const gap = (WIDTH - 32 - hosts.length * box) / links.length;
  const leftOf = (host: number) => 16 + host * (box + gap);
  for (const [at, { left, right, label, note, queue, drop }] of links.entries()) {
    const from = leftOf(at) + box, to = leftOf(at + 1), center = (from + to) / 2;
    canvas.line(from, middle, to, middle, "wire");
    canvas.text(from + 5, middle + 15, left, "device");
    canvas.text(to - 5, middle + 15, right, "device end");
    // Packets that wait are bars, at the end at which they wait.
    const first = queue === "left" ? from + 26 : to - 26 - 4 * 9;
    for (let packet = 0; queue !== undefined && packet < 4; packet++) {
      canvas.box(first + packet * 9, middle - 9, 6, 18, "s1", 1);
    }
    if (drop !== undefined) canvas.cross(drop === "left" ? from + 34 : to - 34, middle, 1);
    if (label !== undefined) canvas.text(center, middle - 15, label, "small middle");
    if (note !== undefined) canvas.text(center, middle + 36, note, "small middle");
  }
  const hasNotes = hosts.some(({ note }) => note !== undefined);
  for (const [at, { name, note }] of hosts.entries()) {
    canvas.box(leftOf(at), top, box, height, "box", 4);
    canvas.text(leftOf(at) + box / 2, middle + 5, name, "middle");
    const style = at === 0 ? "small" : at === hosts.length - 1 ? "small end" : "small middle";
    const x = leftOf(at) + (at === 0 ? 0 : at === hosts.length - 1 ? box : box / 2);
    if (note !== undefined) canvas.text(x, top + height + 20, note, style);
  }
  canvas.y = top + height + (hasNotes || links.some(({ note }) => note !== undefined) ? 44 : 30);
  canvas.text(16, canvas.y, traffic, "small");
}

/** Where the values of an axis are, and which of them have a line and a label, or a line only. */
export interface Scale {
  place(value: number): number;
  readonly ticks: readonly number[];
  readonly minor: readonly number[];
}

/**
 * A log axis between two coordinates. It reaches from 1, 2 or 5 to 1, 2 or 5 times a power of ten,
 * and has a tick at each power of ten, or at each of those numbers if it is short.
 */
export function logScale(values: readonly number[], start: number, end: number): Scale {
  const known = values.filter((value) => value > 0);
  const [low, high] = known.length > 0 ? [Math.min(...known), Math.max(...known)] : [1, 10];
  const powers = Array.from({ length: 12 }, (_, at) => 10 ** (at - 4));
  const steps = powers.flatMap((power) => [power, 2 * power, 5 * power]);
  const from = steps.findLast((step) => step <= low) ?? steps[0];
  const to = steps.find((step) => step >= high && step > from) ?? steps.at(-1)!;
  const inside = steps.filter((step) => step >= from && step <= to);
  const decades = inside.filter((step) => powers.includes(step));
  return {
    place: (value) =>
      start + Math.log(Math.max(from, value) / from) / Math.log(to / from) * (end - start),
    ticks: decades.length < 3 ? inside : decades,
    minor: inside,
  };
}

/** A linear axis between two coordinates, from 0 up, with three to five ticks above 0. */
function linearScale(values: readonly number[], start: number, end: number): Scale {
  const highest = Math.max(0.01, ...values);
  const power = 10 ** Math.floor(Math.log10(highest / 3));
  const step = [1, 2, 5, 10].map((n) => n * power).findLast((step) => highest / step > 2.5)!;
  const count = Math.ceil(highest / step);
  const ticks = Array.from({ length: count + 1 }, (_, at) => at * step);
  return { place: (value) => start + value / ticks[count] * (end - start), ticks, minor: [] };
}

/** A number without the rounding errors of floating point. */
function plain(value: number): string {
  return String(Number(value.toPrecision(6)));
}

/** Milliseconds for people: `0.5 ms`, `20 ms`, `1.5 s`. */
export function duration(milliseconds: number): string {
  if (!Number.isFinite(milliseconds)) return "no reply";
  const isLong = milliseconds >= 999.5;
  const value = isLong ? milliseconds / 1000 : milliseconds;
  const digits = value < 1 ? 2 : value < 10 ? 1 : 0;
  return `${Number(value.toFixed(digits))} ${isLong ? "s" : "ms"}`;
}

function strips(canvas: Canvas, { axis, strips }: Strips): void {
  const left = 190, step = 50, top = canvas.y + 4, bottom = top + strips.length * step;
  const isFailed = strips.some(({ values }) => values.includes(null));
  const right = isFailed ? RIGHT - 56 : RIGHT - 16;
  const values = strips.flatMap(({ values }) => values.filter((value) => value !== null));
  const { place, ticks, minor } = logScale(values, left, right);
  for (const tick of minor) canvas.line(place(tick), top, place(tick), bottom, "minor");
  for (const tick of ticks) {
    canvas.line(place(tick), top, place(tick), bottom, "grid");
    canvas.text(place(tick), bottom + 18, duration(tick), "small middle");
  }
  for (const [at, { label, style, values, median }] of strips.entries()) {
    const middle = top + (at + 0.5) * step;
    canvas.line(16, middle + step / 2, RIGHT, middle + step / 2, "grid");
    canvas.text(16, middle - 3, label);
    canvas.text(16, middle + 15, `median ${duration(median)}`, "small");
    for (const [index, value] of values.entries()) {
      // Spread over the strip, in an order that looks random and is always the same.
      const y = middle + ((index * 0.618034) % 1 - 0.5) * (step - 16);
      if (value === null) canvas.cross(RIGHT - 20, y, style);
      else canvas.dot(place(value), y, style);
    }
    if (!Number.isFinite(median)) continue;
    canvas.bar(place(median), middle - 21, place(median), middle + 21, style);
  }
  if (isFailed) canvas.text(RIGHT, bottom + 18, "✕ failed", "small end");
  canvas.text((left + right) / 2, bottom + 38, axis, "small middle");
  canvas.y = bottom + 40;
}

function course(canvas: Canvas, { axes, unit, from, to, shaded, series }: Course): void {
  const isAlone = series.length === 1;
  for (const { label, style, isLine } of series) {
    canvas.y += 18;
    if (isLine) canvas.polyline([[16, canvas.y - 5], [44, canvas.y - 5]], style, isAlone);
    else canvas.dot(30, canvas.y - 5, style);
    canvas.text(54, canvas.y, label, "small");
  }
  const isTime = unit === "ms";
  canvas.text(16, canvas.y + 26, axes.y, "small");
  const top = canvas.y + 44, bottom = top + (isTime ? 190 : 110);
  const all = series.flatMap(({ points }) => points.map(([, value]) => value));
  const scale = isTime ? logScale : linearScale;
  const { place, ticks, minor } = scale(all.filter((value) => value !== null), bottom, top);
  const x = (seconds: number) =>
    LEFT + (Math.max(from, Math.min(to, seconds)) - from) / (to - from) * (RIGHT - LEFT);
  if (shaded !== undefined) {
    const [first, last] = [x(shaded.from), x(shaded.to)];
    canvas.box(first, top, last - first, bottom - top, "shade");
    for (const edge of [first, last]) canvas.line(edge, top - 6, edge, bottom, "edge");
    canvas.text((first + last) / 2, top - 6, shaded.label, "small middle");
  }
  for (const tick of minor) canvas.line(LEFT, place(tick), RIGHT, place(tick), "minor");
  for (const tick of ticks) {
    canvas.line(LEFT, place(tick), RIGHT, place(tick), "grid");
    canvas.text(LEFT - 6, place(tick) + 5, isTime ? duration(tick) : plain(tick), "small end");
  }
  const step = [0.5, 1, 2, 5, 10].find((step) => (to - from) / step <= 8) ?? 20;
  for (let tick = Math.ceil(from / step) * step; tick <= to; tick += step) {
    // The label of a tick at the right edge would reach beyond it.
    const isLast = x(tick) > RIGHT - 15;
    canvas.line(x(tick), bottom, x(tick), bottom + 5, "wire");
    canvas.text(
      isLast ? RIGHT : x(tick),
      bottom + 20,
      `${plain(tick)} s`,
      isLast ? "small end" : "small middle",
    );
  }
  canvas.line(LEFT, bottom, RIGHT, bottom, "wire");
  for (const { points, style, isLine } of series) {
    const placed = points.map(([at, value]) => [x(at), place(value ?? NaN)] as const);
    if (isLine) {
      const steps = placed.flatMap(([x, y], at) =>
        [[placed[at - 1]?.[0] ?? x, y], [x, y]] as const
      );
      canvas.polyline(steps, style, isAlone);
    } else {for (const [x, y] of placed) {
        Number.isNaN(y) ? canvas.cross(x, top + 6, style) : canvas.dot(x, y, style);
      }}
  }
  for (const { style, medians = [] } of series) {
    for (const [first, last, value] of medians) {
      if (Number.isFinite(value)) canvas.bar(x(first), place(value), x(last), place(value), style);
    }
  }
  canvas.text((LEFT + RIGHT) / 2, bottom + 40, axes.x, "small middle");
  canvas.y = bottom + 42;
}

function grid(canvas: Canvas, { cells }: Grid): void {
  const width = (RIGHT - 16) / 8, height = 44, top = canvas.y + 4;
  for (const [at, { label, became }] of cells.entries()) {
    const x = 16 + at % 8 * width, y = top + Math.floor(at / 8) * height;
    canvas.box(x + 2, y + 2, width - 4, height - 4, "box", 3);
    if (became === null) canvas.text(x + width / 2, y + 27, label, "small middle");
    else {
      canvas.box(x + 2, y + 2, 5, height - 4, "s1", 2);
      canvas.text(x + width / 2 + 3, y + 19, label, "title middle");
      canvas.text(x + width / 2 + 3, y + 36, `→ ${became}`, "middle");
    }
  }
  canvas.y = top + Math.ceil(cells.length / 8) * height;
}

function lines(canvas: Canvas, { lines }: Lines): void {
  for (const line of lines) canvas.text(16, canvas.y += 17, line, "code");
}
