/**
 * Several marks in turn, round after round, and the table of them.
 *
 * @module
 */

import { pause } from "../ffi/deno.ts";
import { hex, type Mark, sameDscp } from "../ffi/dscp.ts";
import type { Exchange, Requester, RequestOptions } from "./exchange.ts";
import { Exit, Failure, isGranted } from "./failure.ts";
import { Limits } from "./limits.ts";
import { expectedOf, type Options, requestOptionsOf } from "./options.ts";
import { LiveText, onInterrupt, sinkFor, toStandardOutput, widthOf } from "./output.ts";
import { json, jsonLine, markLabel } from "./report.ts";
import { builtInServer, type Server } from "./server.ts";
import {
  baselineOf,
  compare,
  type Comparison,
  MIN_SAMPLES,
  quantile,
  type Sample,
  shuffled,
  SLOW,
  thresholdFor,
} from "./statistics.ts";
import { DEFAULT_HOST } from "./target.ts";
import { plural, shortTime, wrap } from "./text.ts";
import { isWrongMark, moreSevere } from "./verdict.ts";

/** What became of the requests with one mark. */
export class Row implements Sample {
  requests = 0;
  /** How many failed for another reason than a wrong mark. */
  failed = 0;
  /** How many left, arrived or came back with another mark. */
  wrong = 0;
  /** How many had any answer, and how many had all marked packets arrive as they should. */
  answered = 0;
  kept = 0;
  /** How many ran out of time before the far end had acknowledged a marked packet, or answered. */
  lost = 0;
  /** How many of those had a connection, and were not seen leaving. */
  lostUnseen = 0;
  /** The bytes that packets left with, and whether one was wrong. */
  readonly sent: Set<number> = new Set();
  isSentWrong = false;
  /** The same of marked packets that arrived, if known. */
  readonly arrived: Set<number> = new Set();
  isArrivedWrong = false;
  /** What unmarked packets arrived with that had been changed, such as `SYN 0x20`. */
  readonly changed: Set<string> = new Set();
  /** Milliseconds to connect and in all; `NaN` if no whole reply came. */
  readonly connect: number[] = [];
  readonly total: number[] = [];
  /** Which requests failed. */
  readonly failures: boolean[] = [];

  constructor(readonly mark: Mark) {}

  add(exchange: Exchange): void {
    const { connection, markSyn, sent, arrived, returned, reply, milliseconds, failure } = exchange;
    const isFailed = failure !== null && !(isWrongMark(failure) && reply?.complete);
    this.requests++;
    this.failures.push(isFailed);
    if (isFailed) this.failed++;
    if (sent.proved === false) this.isSentWrong = true;
    if (arrived?.kept === false) this.isArrivedWrong = true;
    if ([sent.proved, arrived?.kept, returned.kept].includes(false)) this.wrong++;
    if (arrived?.kept === true) this.kept++;
    if (reply !== null) this.answered++;
    if (isLost(exchange)) this.lost++;
    if (isLost(exchange) && connection !== null && sent.packets.length === 0) this.lostUnseen++;
    for (const { tos } of sent.packets) this.sent.add(tos);
    if (sent.outerTos !== null) this.sent.add(sent.outerTos);
    for (const tos of arrived?.marked ?? []) this.arrived.add(tos);
    const { packet = "data", arrived: tos = 0 } = arrived?.changes[0] ?? {};
    if (packet !== "data" && !markSyn) this.changed.add(`${packet} ${hex(tos)}`);
    this.connect.push(reply?.complete ? milliseconds.connect! : NaN);
    this.total.push(reply?.complete ? milliseconds.total! : NaN);
  }
}

/** Whether time ran out and nothing marked came through: what is sent again was not acked. */
function isLost({ connection, markSyn, sent, reply, failure }: Exchange): boolean {
  if (failure?.code !== Exit.timeout || reply !== null) return false;
  if (connection === null) return markSyn;
  return sent.packets.length === 0 || sent.repeats > 0;
}

/** A bar of `share` (0 to 1) of `width` characters, to an eighth of one. */
export function bar(share: number, width: number): string {
  const eighths = Math.round(share * width * 8);
  return "█".repeat(eighths >> 3) + ["", ..."▏▎▍▌▋▊▉"][eighths % 8];
}

/** The columns of the table: a title of two lines, and a cell a row. */
function columnsOf(rows: readonly Row[]): string[][] {
  const time = (values: number[], share: number) => shortTime(quantile(values, share));
  const bytes = (all: Iterable<number>, isWrong: boolean, more: Iterable<string> = []) =>
    ([...Array.from(all, hex), ...more].join(" ") || "-") + (isWrong ? " !" : "");
  return [
    ["", "mark", ...rows.map(({ mark }) => markLabel(mark))],
    ["", "sent", ...rows.map((row) => bytes(row.sent, row.isSentWrong))],
    ["", "arrived", ...rows.map((row) => bytes(row.arrived, row.isArrivedWrong, row.changed))],
    ["", "requests", ...rows.map(({ requests }) => `${requests}`)],
    ["", "failed", ...rows.map(({ failed }) => `${failed}`)],
    ["wrong", "mark", ...rows.map(({ wrong }) => `${wrong}`)],
    ["connect ms", "median", ...rows.map(({ connect }) => time(connect, 0.5))],
    ["total ms", "median", ...rows.map(({ total }) => time(total, 0.5))],
    ["", "p95", ...rows.map(({ total }) => time(total, 0.95))],
    ["", "max", ...rows.map(({ total }) => time(total, 1))],
  ];
}

/** Which columns a narrow terminal does without, the first first: the times stay longest. */
const DISPENSABLE = "connect ms median|requests|arrived|sent|failed|wrong mark|max|p95".split("|");

/** The rows as a table of at most `width` columns; a bar shows each median if there is room. */
export function table(rows: readonly Row[], width: number): string {
  let columns = columnsOf(rows);
  const nameOf = ([title, under]: string[]) => `${title} ${under}`.trim();
  const widthOf = (column: string[]) => Math.max(...column.map(({ length }) => length));
  const used = () => columns.reduce((sum, column) => sum + widthOf(column) + 1, -1);
  for (const name of DISPENSABLE) {
    if (used() > width) columns = columns.filter((column) => nameOf(column) !== name);
  }
  const room = Math.min(24, width - used() - 1);
  const isEnough = rows.every(({ total }) => total.filter(Number.isFinite).length >= MIN_SAMPLES);
  if (isEnough && room >= "(median)".length) {
    const medians = rows.map(({ total }) => quantile(total, 0.5));
    const bars = medians.map((median) => bar(median / Math.max(...medians), room));
    columns.push(["bar:", "(median)", ...bars]);
  }
  const cells = columns.map((column) => {
    const isText = ["mark", "sent", "arrived", "bar: (median)"].includes(nameOf(column));
    const pad = isText ? "padEnd" : "padStart", size = widthOf(column);
    return column.map((cell) => cell[pad](size));
  });
  const lineOf = (at: number) => cells.map((column) => column[at]).join(" ").trimEnd();
  return cells[0].map((_, at) => `${lineOf(at).slice(0, width)}\n`).join("");
}

/** How a mark compares with the baseline, and both. */
type Compared = Comparison & { readonly row: Row; readonly baseline: Row };

/** What the network did to marks, in lines of at most `width` columns; nothing of one mark. */
export function comparisonText(rows: readonly Row[], width: number): string {
  if (rows.length === 1) return "";
  const baseline = baselineOf(rows);
  const compared = compare(rows).flatMap((one, at) =>
    one === null ? [] : [{ ...one, row: rows[at], baseline }]
  );
  const sentences = [
    ...fewOf(compared.flatMap(failedText)),
    ...fewOf(compared.flatMap(slowText)),
    ...timesText(compared, thresholdFor(rows.length)),
    // So many marks are asked for to see which pass.
    ...rows.length > 2 * MOST_NAMED ? [passText(rows)] : [],
  ];
  return sentences.map((sentence) => wrap(sentence, width)).join("");
}

/** How many marks are named, or have a sentence of their own. */
const MOST_NAMED = 4;

function fewOf(sentences: string[]): string[] {
  const more = sentences.length - MOST_NAMED;
  return more <= 0 ? sentences : [
    ...sentences.slice(0, MOST_NAMED),
    `The same can be said of ${plural(more, "more mark")}.`,
  ];
}

/** Whether more requests fail. A cause is named only if all of those that failed were lost. */
function failedText({ failed, row, baseline }: Compared): string[] {
  const { count, of, against, p, differs } = failed;
  const isOurs = count / of > against.count / against.of;
  const [worse, better] = isOurs ? [row, baseline] : [baseline, row];
  const [name, other] = [markLabel(worse.mark), markLabel(better.mark)];
  const isContrast = worse.failed > 0 && worse.failed === worse.requests &&
    better.failed === 0 && better.requests > 0;
  if (!differs && !(differs === null && isContrast)) return [];
  const isAll = worse.lost === worse.requests, rest = better.requests - better.failed;
  const counts = isAll
    ? `${name}: 0 of ${worse.requests} answered, ${other}: ${rest} of ${better.requests}`
    : `${worse.failed} of ${plural(worse.requests, "request")} with ${name} failed, ` +
      `${better.failed} of ${better.requests} with ${other}`;
  const where = worse.lostUnseen > 0 ? "this host or the path" : "the path";
  const what = isAll ? `drops ${name}` : `drops or polices ${name}`;
  const cause = worse.lost === worse.failed
    ? `: ${where} ${what}, or delays it past the time limit`
    : "";
  const claim = differs ? cause : ": too few requests to tell this from chance";
  return [`${counts} (p = ${shortP(p)})${claim}.`];
}

/** Whether there are more slow replies, unless most are slow: then the medians show it. */
function slowText({ slow, differs, row, baseline }: Compared): string[] {
  const { count, of, against, p, over } = slow;
  if (!slow.differs || (differs && Math.max(count / of, against.count / against.of) > 0.5)) {
    return [];
  }
  return [
    `${count} of ${of} replies with ${markLabel(row.mark)} took over ${shortTime(over)} ms, ` +
    `${SLOW} times the median, ${against.count} of ${against.of} with ` +
    `${markLabel(baseline.mark)} (p = ${shortP(p)}).`,
  ];
}

/** Whether typical times differ, and of which marks nothing at all can be said. */
function timesText(compared: readonly Compared[], threshold: number): string[] {
  const list = (some: Compared[]) =>
    some.length > MOST_NAMED
      ? `${some.length} others`
      : some.map(({ row }) => markLabel(row.mark)).join(", ");
  const pOf = ({ p, slow, failed }: Compared) => Math.min(p, slow.p, failed.p);
  const others = compared.filter(({ slow, failed }) => !slow.differs && !failed.differs);
  const few = others.filter(({ differs }) => differs === null);
  const same = others.filter((one) => one.differs === false && pOf(one) >= threshold);
  const small = others.filter((one) => one.differs === false && pOf(one) < threshold);
  const parts = compared.filter(({ differs }) => differs).map(({ row, ratio, p }) => {
    const factor = Math.max(ratio, 1 / ratio), word = ratio > 1 ? "faster" : "slower";
    const times = `${factor.toFixed(factor < 10 ? 2 : 0)} times`;
    return `${markLabel(row.mark)} is ${times} ${word} (p = ${shortP(p)})`;
  });
  if (same.length > 0) {
    const least = shortP(Math.min(...same.map(pOf)));
    parts.push(`no difference seen for ${list(same)} (p ${same.length > 1 ? "≥" : "="} ${least})`);
  }
  if (small.length > 0) parts.push(`no difference seen that matters for ${list(small)}`);
  if (few.length === compared.length) {
    parts.push(`with fewer than ${MIN_SAMPLES} replies to a mark no difference can be seen`);
  } else if (few.length > 0) {
    parts.push(`too few replies, under ${MIN_SAMPLES}, for ${list(few)}`);
  }
  const against = `Against ${markLabel(compared[0].against)}, median total time`;
  return parts.length === 0 ? [] : [`${against}: ${parts.join(", ")}.`];
}

/** What can become of a mark, in the order of the summary: what is so first is said of it. */
const FATES: readonly (readonly [fate: string, isSo: (row: Row) => boolean])[] = [
  [
    "pass unchanged",
    (row) => row.kept > 0 && row.kept === row.requests && row.wrong === 0 && isSame(row),
  ],
  ["are changed", (row) => !isSame(row) || (row.wrong > 0 && row.arrived.size === 0)],
  ["pass, but are not as they should be", ({ wrong }) => wrong > 0],
  ["were not tried", ({ requests }) => requests === 0],
  ["get no answer", ({ answered }) => answered === 0],
  ["are answered in part", ({ answered, requests }) => answered < requests],
  ["are answered without a report of what arrived", () => true],
];

/** Whether nothing is known to have arrived with another mark. */
function isSame({ mark, arrived }: Row): boolean {
  return [...arrived].every((tos) => sameDscp(tos, mark.tos));
}

/** Which marks pass: what became of each, as far as it is known. */
function passText(rows: readonly Row[]): string {
  const byFate = Map.groupBy(rows, (row) => FATES.find(([, isSo]) => isSo(row))![0]);
  const fates = FATES.filter(([fate]) => byFate.has(fate)).map(([fate], at) => {
    const marks = byFate.get(fate)!, of = at === 0 ? ` of ${rows.length} marks` : "";
    const isNamed = fate === "pass unchanged" && marks.length < rows.length;
    const names = isNamed ? `: ${marks.map(({ mark }) => markLabel(mark)).join(", ")}` : "";
    return `${marks.length}${of} ${fate}${names}`;
  });
  return `${fates.join("; ")}.`;
}

/** A probability in few characters: `0.021`, `5.2e-6`. */
function shortP(p: number): string {
  return p < 0.001 ? Math.max(p, Number.MIN_VALUE).toExponential(1) : p.toPrecision(2);
}

/** The rows as one line of JSON. */
export function summaryJson(rows: readonly Row[]): string {
  const compared = compare(rows);
  const summary = rows.map(({ mark, requests, failed, wrong, connect, total, ...row }, at) => ({
    mark,
    requests,
    failed,
    wrong,
    sent: [...row.sent],
    arrived: [...row.arrived],
    changed: [...row.changed],
    milliseconds: {
      connect: { median: quantile(connect, 0.5) },
      total: { median: quantile(total, 0.5), p95: quantile(total, 0.95), max: quantile(total, 1) },
    },
    compared: compared[at] && { ...compared[at], against: markLabel(compared[at].against) },
  }));
  // JSON writes NaN as null: unknown.
  return jsonLine({ summary });
}

/** Who is next: an unmeasured request (round 0), then all marks in each round, in random order. */
function* turns(rows: readonly Row[], rounds: number): Generator<[row: Row, round: number]> {
  // The first request to a server pays for what the others find in caches.
  yield [baselineOf(rows), 0];
  // In a fixed order a server that alternates between two backends would favour a mark.
  for (let round = 1; round <= rounds; round++) {
    for (const row of shuffled(rows)) yield [row, round];
  }
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
  for (const [row, round] of turns(rows, options.count)) {
    if (round > 0 && options.interval > 0) await orInterrupt(pause(options.interval * 1000));
    const expect = expectedOf(options, rows.indexOf(row)), asked = { ...requestOptions, expect };
    const exchange = await request(server.target, row.mark, asked, sink, { limits });
    const failure = limits.stopped ?? exchange.failure;
    const line = () => json(exchange, failure, { ...server, round: Math.max(1, round) });
    if (limits.stopped !== null) {
      screen.clear();
      const last = done > 0
        ? printResult(rows, options)
        : options.json
        ? toStandardOutput(line())
        : null;
      await Promise.race([last, pause(200)]);
      return limits.stopped;
    }
    // Without a permission or libc all others would fail the same way.
    if (failure?.code === Exit.cannotRun) throw failure;
    if (round === 0) {
      await server.throwIfGone(exchange, true);
      continue;
    }
    first = moreSevere(first, failure);
    row.add(exchange);
    done++;
    if (options.json) await orInterrupt(toStandardOutput(line()));
    const progress = `${done} of ${count} requests, Ctrl-C to stop\n`;
    screen.update((width) => table(rows, width) + progress);
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
  await using server = (await builtInServer(DEFAULT_HOST, 0))!;
  const local = { ...options, family: options.family && 4 as const, maxTime: 1 };
  // The built-in server does not speak TLS; a handshake that fails warms most of it up.
  if (isHttps) await request({ ...server.target, isHttps }, mark, local);
  for (let at = 0; at < 16; at++) {
    if ((await request(server.target, mark, local)).failure !== null) return;
  }
}
