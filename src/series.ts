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
import { compare, MIN_SAMPLES, quantile } from "./statistics.ts";
import { DEFAULT_HOST } from "./target.ts";
import { plural, shortTime, wrap } from "./text.ts";
import { isWrongMark, moreSevere } from "./verdict.ts";

/** What became of the requests with one mark. */
export class Row {
  requests = 0;
  /** How many failed for another reason than a wrong mark. */
  failed = 0;
  /** How many left or arrived with another mark. */
  wrong = 0;
  /** The bytes that packets left with, and those that marked packets arrived with, if known. */
  readonly sent: Set<number> = new Set();
  readonly arrived: Set<number> = new Set();
  /** What unmarked packets arrived with that had been changed, such as `SYN 0x20`. */
  readonly changed: Set<string> = new Set();
  /** Milliseconds of those requests whose whole reply came. */
  readonly connect: number[] = [];
  readonly total: number[] = [];

  constructor(readonly mark: Mark) {}

  add({ markSyn, sent, arrived, reply, milliseconds, failure }: Exchange): void {
    this.requests++;
    if (sent.proved === false || arrived?.kept === false) this.wrong++;
    if (failure !== null && !(isWrongMark(failure) && reply?.complete)) this.failed++;
    for (const { tos } of sent.packets) this.sent.add(tos);
    if (sent.outerTos !== null) this.sent.add(sent.outerTos);
    for (const tos of arrived?.marked ?? []) this.arrived.add(tos);
    const { packet = "data", arrived: tos = 0 } = arrived?.changes[0] ?? {};
    if (packet !== "data" && !markSyn) this.changed.add(`${packet} ${hex(tos)}`);
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

/** The columns of the table: a title of two lines, and a cell a row. */
function columnsOf(rows: readonly Row[]): string[][] {
  const time = (values: number[], share: number) => shortTime(quantile(values, share));
  const bytes = (seen: Set<number>, mark: Mark, changed: Iterable<string> = []) => {
    const words = [...Array.from(seen, hex), ...changed];
    const isRight = words.length === seen.size && [...seen].every((b) => sameDscp(b, mark.tos));
    return `${words.join(" ") || "-"}${isRight ? "" : " !"}`;
  };
  return [
    ["", "mark", ...rows.map(({ mark }) => markLabel(mark))],
    ["", "sent", ...rows.map(({ sent, mark }) => bytes(sent, mark))],
    ["", "arrived", ...rows.map(({ arrived, mark, changed }) => bytes(arrived, mark, changed))],
    ["", "requests", ...rows.map(({ requests }) => `${requests}`)],
    ["", "failed", ...rows.map(({ failed }) => `${failed}`)],
    ["wrong", "mark", ...rows.map(({ wrong }) => `${wrong}`)],
    ["connect ms", "median", ...rows.map(({ connect }) => time(connect, 0.5))],
    ["total ms", "median", ...rows.map(({ total }) => time(total, 0.5))],
    ["", "p95", ...rows.map(({ total }) => time(total, 0.95))],
    ["", "max", ...rows.map(({ total }) => time(total, 1))],
  ];
}

/** The rows as a table of at most `width` columns; a bar shows each median if there is room. */
export function table(rows: readonly Row[], width = 80): string {
  const columns = columnsOf(rows);
  const widthOf = (column: string[]) => Math.max(...column.map(({ length }) => length));
  const used = () => columns.reduce((sum, column) => sum + widthOf(column) + 1, 0);
  // What goes first on a narrow terminal: the time to connect, and then from the right.
  for (let at = 6; used() > width + 1 && columns.length > 3; at = columns.length - 1) {
    columns.splice(at, 1);
  }
  const room = Math.min(24, width - used());
  if (room >= "of median".length) {
    const medians = rows.map(({ total }) => quantile(total, 0.5));
    const longest = Math.max(...medians.filter(Number.isFinite));
    const bars = medians.map((median) => bar(median / longest || 0, room));
    columns.push(["bar:", "of median", ...bars]);
  }
  const isText = ([title, under]: string[]) =>
    ["mark", "sent", "arrived", "bar:of median"].includes(title + under);
  const line = (_: string, at: number) =>
    columns.map((column) =>
      isText(column) ? column[at].padEnd(widthOf(column)) : column[at].padStart(widthOf(column))
    ).join(" ").trimEnd().slice(0, width) + "\n";
  return columns[0].map(line).join("");
}

/** Whether the network cared, in sentences of at most `width` columns a line; none for one mark. */
export function comparisonText(rows: readonly Row[], width = 80): string {
  const compared = compare(rows).flatMap((one, at) =>
    one === null ? [] : [{ ...one, name: markLabel(rows[at].mark) }]
  );
  if (compared.length === 0) return "";
  const few = compared.filter(({ differs }) => differs === null);
  const same = compared.filter(({ differs }) => differs === false);
  const list = (some: { name: string }[]) =>
    some.length > 4 ? `${some.length} others` : some.map(({ name }) => name).join(", ");
  const parts = compared.filter(({ differs }) => differs).map(({ name, ratio, p }) => {
    const factor = Math.max(ratio, 1 / ratio), word = ratio > 1 ? "faster" : "slower";
    return `${name} is ${factor.toFixed(factor < 10 ? 2 : 0)} times ${word} (p = ${shortP(p)})`;
  });
  if (same.length > 0) {
    const least = shortP(Math.min(...same.map(({ p }) => p)));
    parts.push(`no difference seen for ${list(same)} (p ${same.length > 1 ? "≥" : "="} ${least})`);
  }
  if (few.length > 0) parts.push(`too few replies, under ${MIN_SAMPLES}, for ${list(few)}`);
  const text = few.length < compared.length
    ? parts.join(", ")
    : `with fewer than ${MIN_SAMPLES} replies to a mark no difference can be seen`;
  return wrap(`Against ${markLabel(compared[0].against)}, median total time: ${text}.`, width);
}

/** A probability in few characters: `0.021`, `5.2e-6`. */
const shortP = (p: number) => p < 0.001 ? p.toExponential(1) : p.toPrecision(2);

function summaryJson(rows: readonly Row[]): string {
  const compared = compare(rows);
  const summary = rows.map(({ sent, arrived, changed, connect, total, ...plain }, at) => ({
    ...plain,
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

/** Runs the series. @returns the first failure, a wrong mark before others, or `null` */
export async function series(
  server: Server,
  options: Options,
  request: Requester,
): Promise<Failure | null> {
  const rows = options.marks.map((mark) => new Row(mark));
  const count = options.count * rows.length, sink = sinkFor(options);
  const requestOptions = await requestOptionsOf(options), limits = new Limits(requestOptions);
  let first: Failure | null = null, done = 0, release = () => {};
  using screen = new LiveText(!options.json && !options.silent);
  using _signals = onInterrupt((code) => {
    const after = done > 0 ? ` after ${done} of ${plural(count, "request")}` : "";
    limits.stop(new Failure(code, `interrupted${after}`));
    release();
  });
  // Standard output may have a reader that has stopped. Not Promise.race, as in readReply.
  const orInterrupt = (work: Promise<void>) =>
    new Promise<void>((resolve, reject) => {
      release = resolve;
      work.then(resolve, reject);
      if (limits.stopped !== null) resolve();
    });
  await orInterrupt(warmUp(server.target.isHttps, options.marks[0], requestOptions, request));
  for (let round = 1; round <= options.count; round++) {
    for (const row of rows) {
      if (done > 0 && options.interval > 0) await orInterrupt(pause(options.interval * 1000));
      const exchange = await request(server.target, row.mark, requestOptions, sink, { limits });
      const line = () =>
        toStandardOutput(json(exchange, limits.stopped ?? exchange.failure, { ...server, round }));
      if (limits.stopped !== null) {
        screen.clear();
        const last = done > 0 ? printResult(rows, options) : options.json ? line() : null;
        await Promise.race([last, pause(200)]);
        return limits.stopped;
      }
      if (done === 0) server.checkPresent(exchange, true);
      // Without a permission or libc all others would fail the same way.
      if (exchange.failure?.code === Exit.cannotRun) throw exchange.failure;
      first = moreSevere(first, exchange.failure);
      row.add(exchange);
      done++;
      if (options.json) await orInterrupt(line());
      const progress = `${done} of ${count} requests, Ctrl-C to stop\n`;
      screen.update((width) => table(rows, width) + progress);
    }
  }
  screen.clear();
  await orInterrupt(printResult(rows, options));
  return limits.stopped ?? seriesFailure(rows, first);
}

async function printResult(rows: readonly Row[], { json, silent }: Options): Promise<void> {
  const width = widthOf(Deno.stdout);
  if (json) await toStandardOutput(summaryJson(rows));
  else if (!silent) await toStandardOutput(table(rows, width) + comparisonText(rows, width));
}

/** The failure that a series ends with, with the counts of all. @param first the most severe */
export function seriesFailure(rows: readonly Row[], first: Failure | null): Failure | null {
  if (first === null) return null;
  const sum = (of: "requests" | "failed" | "wrong") => rows.reduce((sum, row) => sum + row[of], 0);
  const all = plural(sum("requests"), "request"), parts: string[] = [];
  if (sum("failed") > 0) parts.push(`${sum("failed")} of ${all} failed`);
  if (sum("wrong") > 0) parts.push(`${sum("wrong")} of ${all} with a wrong mark`);
  const which = sum("failed") > 0 && isWrongMark(first) ? "first wrong mark" : "the first";
  return new Failure(first.code, `${parts.join(", ")}; ${which}: ${first.message}`);
}

/** Unmeasured requests to ourselves, so that JIT compilation is not charged to the first mark. */
async function warmUp(isHttps: boolean, mark: Mark, options: RequestOptions, request: Requester) {
  if (!isGranted({ name: "net", host: DEFAULT_HOST })) return;
  await using server = builtInServer(DEFAULT_HOST, 0)!;
  const local = { ...options, family: options.family && 4 as const, maxTime: 1 };
  // The built-in server does not speak TLS; a handshake that fails warms most of it up.
  if (isHttps) await request({ ...server.target, isHttps }, mark, local);
  for (let at = 0; at < 16; at++) {
    if ((await request(server.target, mark, local)).failure !== null) return;
  }
}
