/**
 * Several marks in turn, round after round, and the table of them.
 *
 * @module
 */

import { pause } from "../ffi/wait.ts";
import { hex, type Mark, sameDscp } from "../ffi/mod.ts";
import type { Exchange, Requester, RequestOptions } from "./exchange.ts";
import { Exit, Failure, isGranted } from "./failure.ts";
import { Limits } from "./limits.ts";
import { type Options, requestOptionsOf } from "./options.ts";
import { LiveText, onInterrupt, toStandardOutput, widthOf } from "./output.ts";
import { json, jsonLine, markLabel, sinkFor } from "./report.ts";
import { builtInServer, type Server } from "./server.ts";
import { compare, type Comparison, MIN_SAMPLES, quantile } from "./statistics.ts";
import { DEFAULT_HOST, type Target } from "./target.ts";
import { plural, shortTime, wrap } from "./text.ts";
import { isWrongMark, moreSevere } from "./verdict.ts";

/** What became of the requests with one mark. */
export class Row {
  /** How many requests were made. */
  requests = 0;
  /** How many of them failed for another reason than a wrong mark. */
  failed = 0;
  /** How many of them left or arrived with another mark. */
  wrong = 0;
  /** The bytes that packets left with, as far as they were seen. */
  readonly sent: Set<number> = new Set();
  /** The bytes that marked packets arrived with, as far as the far end reports them. */
  readonly arrived: Set<number> = new Set();
  /** What unmarked packets arrived with that had been changed, such as `SYN 0x20`. */
  readonly changed: Set<string> = new Set();
  /** Milliseconds to connect, of those requests whose whole reply came. */
  readonly connect: number[] = [];
  /** Milliseconds of those requests in all. */
  readonly total: number[] = [];

  /** A row without requests. @param mark the mark of all its requests */
  constructor(readonly mark: Mark) {}

  /** Adds a request. */
  add({ markSyn, sent, arrived, reply, milliseconds, failure }: Exchange): void {
    this.requests++;
    if (sent.proved === false || arrived?.kept === false) this.wrong++;
    const isMark = failure?.code === Exit.sentChanged || failure?.code === Exit.arrivedChanged;
    if (failure !== null && !(isMark && reply?.complete)) this.failed++;
    for (const { tos } of sent.packets) this.sent.add(tos);
    if (sent.outerTos !== null) this.sent.add(sent.outerTos);
    for (const tos of arrived?.marked ?? []) this.arrived.add(tos);
    const { packet, arrived: tos } = arrived?.changes[0] ?? {};
    if (tos !== undefined && packet !== "data" && !markSyn) {
      this.changed.add(`${packet} ${hex(tos)}`);
    }
    if (!reply?.complete) return;
    this.connect.push(milliseconds.connect!);
    this.total.push(milliseconds.total!);
  }
}

/** A bar of `share` (0 to 1) of `width` characters, to an eighth of one. */
export function bar(share: number, width: number): string {
  const eighths = Math.round(share * width * 8);
  return "█".repeat(eighths >> 3) + (eighths % 8 === 0 ? "" : "▏▎▍▌▋▊▉"[eighths % 8 - 1]);
}

/** The rows as a table of at most `width` columns; a bar shows each median if there is room. */
export function table(rows: readonly Row[], width = 80): string {
  const bytes = (seen: Set<number>, mark: Mark, changed: Set<string> = new Set()) => {
    const words = [...Array.from(seen, hex), ...changed];
    const isRight = changed.size === 0 && [...seen].every((tos) => sameDscp(tos, mark.tos));
    return words.length === 0 ? "-" : `${words.join(" ")}${isRight ? "" : " !"}`;
  };
  const time = (values: number[], share: number) => shortTime(quantile(values, share));
  type Column = [title: string, under: string, cells: string[], isText?: boolean];
  const columns: Column[] = [
    ["", "mark", rows.map(({ mark }) => markLabel(mark)), true],
    ["", "sent", rows.map(({ sent, mark }) => bytes(sent, mark)), true],
    ["", "arrived", rows.map(({ arrived, mark, changed }) => bytes(arrived, mark, changed)), true],
    ["", "requests", rows.map(({ requests }) => String(requests))],
    ["", "failed", rows.map(({ failed }) => String(failed))],
    ["wrong", "mark", rows.map(({ wrong }) => String(wrong))],
    ["connect ms", "median", rows.map(({ connect }) => time(connect, 0.5))],
    ["total ms", "median", rows.map(({ total }) => time(total, 0.5))],
    ["", "p95", rows.map(({ total }) => time(total, 0.95))],
    ["", "max", rows.map(({ total }) => time(total, 1))],
  ];
  const columnWidth = ([title, under, cells]: Column) =>
    Math.max(...[title, under, ...cells].map(({ length }) => length));
  const used = () => columns.reduce((sum, column) => sum + columnWidth(column) + 1, 0);
  // What goes first on a narrow terminal: the time to connect, and then from the right.
  for (let at = 6; used() > width + 1 && columns.length > 3; at = columns.length - 1) {
    columns.splice(at, 1);
  }
  const room = Math.min(24, width - used());
  if (room >= "of median".length) {
    const medians = rows.map(({ total }) => quantile(total, 0.5));
    const longest = Math.max(...medians.filter(Number.isFinite));
    const bars = medians.map((median) => bar(median / longest || 0, room));
    columns.push(["bar:", "of median", bars, true]);
  }
  const line = (cellOf: (column: Column) => string) =>
    columns.map((column) => {
      const cell = cellOf(column);
      return column[3] ? cell.padEnd(columnWidth(column)) : cell.padStart(columnWidth(column));
    }).join(" ").trimEnd().slice(0, width) + "\n";
  const body = rows.map((_, row) => line(([, , cells]) => cells[row]));
  return line(([title]) => title) + line(([, under]) => under) + body.join("");
}

/** Whether the network cared, in sentences of at most `width` columns a line; none for one mark. */
export function comparisonText(rows: readonly Row[], width = 80): string {
  const compared = compare(rows).flatMap((one, at) =>
    one === null ? [] : [{ ...one, name: markLabel(rows[at].mark) }]
  );
  if (compared.length === 0) return "";
  const few = compared.filter(({ differs }) => differs === null);
  const same = compared.filter(({ differs }) => differs === false);
  const list = (some: readonly { name: string }[]) =>
    some.length > 4 ? `${some.length} others` : some.map(({ name }) => name).join(", ");
  const parts = compared.filter(({ differs }) => differs).map(({ name, ratio, p }) => {
    const factor = Math.max(ratio, 1 / ratio), word = ratio > 1 ? "faster" : "slower";
    return `${name} is ${factor.toFixed(factor < 10 ? 2 : 0)} times ${word} (p = ${shortP(p)})`;
  });
  if (same.length > 0) parts.push(`no difference seen for ${list(same)}${leastP(same)}`);
  if (few.length > 0) parts.push(`too few replies, under ${MIN_SAMPLES}, for ${list(few)}`);
  const text = few.length < compared.length
    ? parts.join(", ")
    : `with fewer than ${MIN_SAMPLES} replies to a mark no difference can be seen${leastP(few)}`;
  return wrap(`Against ${markLabel(compared[0].against)}, median total time: ${text}.`, width);
}

/** The smallest p, behind a space and in brackets; nothing if none is known. */
function leastP(compared: readonly Comparison[]): string {
  const known = compared.map(({ p }) => p).filter(Number.isFinite);
  if (known.length === 0) return "";
  return ` (p ${compared.length > 1 ? "≥" : "="} ${shortP(Math.min(...known))})`;
}

/** A probability in few characters: `0.021`, `5.2e-6`. */
function shortP(p: number): string {
  return p < 0.001 ? p.toExponential(1) : p.toPrecision(2);
}

/** The rows as one line of JSON. */
function summaryJson(rows: readonly Row[]): string {
  const compared = compare(rows);
  const summary = rows.map((
    { mark, requests, failed, wrong, sent, arrived, changed, connect, total },
    at,
  ) => ({
    mark,
    requests,
    failed,
    wrong,
    sent: [...sent],
    arrived: [...arrived],
    changed: [...changed],
    milliseconds: {
      connect: { median: quantile(connect, 0.5) },
      total: { median: quantile(total, 0.5), p95: quantile(total, 0.95), max: quantile(total, 1) },
    },
    compared: compared[at] && { ...compared[at], against: markLabel(compared[at].against) },
  }));
  // JSON writes NaN as null: unknown.
  return jsonLine({ summary });
}

/**
 * Several marks in turn, round after round, and the table of them.
 *
 * @returns the first failure, a wrong mark before others, or `null`
 */
export async function series(
  server: Server,
  options: Options,
  request: Requester,
): Promise<Failure | null> {
  const rows = options.marks.map((mark) => new Row(mark));
  const count = options.count * rows.length;
  const requestOptions = await requestOptionsOf(options), limits = new Limits(requestOptions);
  const sink = sinkFor(options);
  using screen = new LiveText(!options.json && !options.silent);
  const result = async () => {
    screen.clear();
    if (options.json) await toStandardOutput(summaryJson(rows));
    else if (!options.silent) {
      const width = widthOf(Deno.stdout);
      await toStandardOutput(table(rows, width) + comparisonText(rows, width));
    }
  };
  let release = () => {};
  // Standard output may have a reader that has stopped. Not Promise.race, as in readReply.
  const orInterrupt = (work: Promise<void>) =>
    new Promise<void>((resolve, reject) => {
      release = resolve;
      work.then(resolve, reject);
      if (limits.stopped !== null) resolve();
    });
  using _signals = onInterrupt((code) => {
    const after = done > 0 ? ` after ${done} of ${plural(count, "request")}` : "";
    limits.stop(new Failure(code, `interrupted${after}`));
    release();
  });
  let first: Failure | null = null, done = 0;
  await orInterrupt(warmUp(server.target, options.marks[0], requestOptions, request));
  for (let round = 1; round <= options.count; round++) {
    for (const row of rows) {
      if (done > 0 && options.interval > 0) {
        await orInterrupt(pause(options.interval * 1000));
      }
      const exchange = await request(server.target, row.mark, requestOptions, sink, { limits });
      if (limits.stopped !== null) {
        const last = () => toStandardOutput(json(exchange, limits.stopped, { ...server, round }));
        const printing = done > 0 ? result() : options.json ? last() : null;
        await Promise.race([printing, pause(200)]);
        return limits.stopped;
      }
      if (done === 0) server.checkPresent(exchange, true);
      const { failure } = exchange;
      // Without a permission or libc all others would fail the same way.
      if (failure?.code === Exit.cannotRun) throw failure;
      first = moreSevere(first, failure);
      row.add(exchange);
      done++;
      if (options.json) {
        await orInterrupt(toStandardOutput(json(exchange, failure, { ...server, round })));
      } else {
        const progress = `${done} of ${count} requests, Ctrl-C to stop\n`;
        screen.update((width) => table(rows, width) + progress);
      }
    }
  }
  await orInterrupt(result());
  if (first === null || limits.stopped !== null) return limits.stopped;
  const sum = (of: "failed" | "wrong") => rows.reduce((sum, row) => sum + row[of], 0);
  const parts = [
    ...sum("failed") > 0 ? [`${sum("failed")} of ${plural(count, "request")} failed`] : [],
    ...sum("wrong") > 0 ? [`${sum("wrong")} of ${plural(count, "request")} with a wrong mark`] : [],
  ];
  const which = sum("failed") > 0 && isWrongMark(first) ? "first wrong mark" : "the first";
  return new Failure(first.code, `${parts.join(", ")}; ${which}: ${first.message}`);
}

/** Unmeasured requests to ourselves, so that JIT compilation is not charged to the first mark. */
async function warmUp(
  { isHttps }: Target,
  mark: Mark,
  options: RequestOptions,
  request: Requester,
): Promise<void> {
  if (!isGranted({ name: "net", host: DEFAULT_HOST })) return;
  await using server = builtInServer(DEFAULT_HOST, 0)!;
  const local = { ...options, family: options.family && 4 as const, maxTime: 1 };
  // The built-in server does not speak TLS; a handshake that fails warms most of it up.
  if (isHttps) await request({ ...server.target, isHttps }, mark, local, {});
  for (let at = 0; at < 16; at++) {
    if ((await request(server.target, mark, local, {})).failure !== null) return;
  }
}
