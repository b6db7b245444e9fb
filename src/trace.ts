/**
 * Hop by hop: what each router received of a mark, in words and in a table.
 *
 * @module
 */

import { pause } from "../ffi/wait.ts";
import { describe, type Hop, type Mark, MarkedConn, markOf, sameDscp } from "../ffi/mod.ts";
import type { Climb } from "../ffi/path.ts";
import type { Change, Exchange, Requester, RequestOptions, Sink } from "./exchange.ts";
import { Exit, Failure } from "./failure.ts";
import { Limits } from "./limits.ts";
import {
  type GetOptions,
  MAX_HOPS,
  type Options,
  REQUEST_DEFAULTS,
  requestOptionsOf,
  TRACE_TIMEOUT,
  withDefaults,
} from "./options.ts";
import {
  forcedExit,
  lineToStandardError,
  LiveText,
  onInterrupt,
  toStandardError,
  toStandardOutput,
  widthOf,
} from "./output.ts";
import { json, markedReport, markLabel, outcomeReport, sinkFor } from "./report.ts";
import type { Server } from "./server.ts";
import type { Target } from "./target.ts";
import { plural, shortTime, wrap } from "./text.ts";
import { assessSent, coversAllData, moreSevere, NOT_OBSERVED } from "./verdict.ts";

/** How {@linkcode trace} asks; `connectTimeout` is for the whole path (60). */
export interface TraceOptions extends GetOptions {
  /** The most hops to try, 1 to 64 (30). */
  readonly maxHops?: number;
}

/** What traces of one path have in common. */
interface Route {
  readonly target: Target;
  readonly options: RequestOptions & { readonly maxHops: number };
  readonly sink: Sink;
  readonly request: Requester;
}

/** The options of {@linkcode TraceOptions} with the defaults for those left out. */
export function traceOptionsOf(options: TraceOptions) {
  const defaults = { ...REQUEST_DEFAULTS, dscp: "EF", maxHops: 30, connectTimeout: TRACE_TIMEOUT };
  const all = withDefaults(defaults, options), { maxHops } = all;
  if (maxHops >= 1 && maxHops <= MAX_HOPS) return all;
  throw new RangeError(`maxHops is a number from 1 to ${MAX_HOPS}, not ${maxHops}`);
}

/** One trace; iterate it once to run it. Yields each hop as it answers, and ends with the request. */
export class Trace implements AsyncIterable<Hop> {
  /** The hops so far. */
  readonly path: Hop[] = [];
  /** The request, once the hops are there. */
  exchange: Exchange | null = null;
  readonly #route: Route;
  readonly #climb: Climb | null;

  /** For {@linkcode trace}. @param climb one that other traces use as well */
  constructor(readonly mark: Mark, route: Route, climb: Climb | null = null) {
    this.#route = route;
    this.#climb = climb;
  }

  /** Where the mark was changed, nearest first. */
  get changes(): Change[] {
    const changes: Change[] = [];
    let after: number | null = 0, from = this.mark.tos;
    for (const { hop, tos } of this.path) {
      if (tos === null) continue;
      if (!sameDscp(tos, from)) changes.push({ after: after!, at: hop, from, to: tos });
      [after, from] = [hop, tos];
    }
    return changes;
  }

  /** Climbs the path, then makes the request on the connection of the last probe. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Hop, void> {
    const { target, sink, request } = this.#route,
      options = { ...this.#route.options, markSyn: true };
    using own = this.#climb === null ? await climbTo(target, options, false) : null;
    const limits = new Limits({ ...options, maxTime: 0 });
    const hops = (this.#climb ?? own!).climb(
      this.mark.tos,
      options.maxHops,
      limits.begin({ ...target, isHttps: false }),
    );
    let last: Hop | null = null, started = performance.now();
    const onMarked = (exchange: Exchange) => this.exchange = exchange;
    let connect: () => Promise<MarkedConn>;
    try {
      let step;
      while (!(step = await hops.next()).done) {
        this.path.push(step.value);
        yield step.value;
      }
      const { conn } = step.value;
      [last, started] = [step.value.hop, step.value.started];
      connect = () => Promise.resolve(MarkedConn.adopt(conn!));
    } catch (error) {
      connect = () => Promise.reject(error);
    } finally {
      limits.end();
    }
    const exchange = await request(target, this.mark, options, sink, {
      started,
      connect,
      onMarked,
    });
    if (last !== null) {
      const tos = reportedByServer(exchange)?.arrived ?? null;
      last = { ...last, tos, evidence: tos === null ? null : "server" };
      this.path.push(last);
    }
    this.exchange = exchange;
    if (last !== null) yield last;
  }

  /** What went wrong: 102 if a hop received another mark, unless it was changed on this host. */
  get failure(): Failure | null {
    const { mark, path, changes: [change], exchange } = this;
    const failure = exchange?.failure ?? null;
    const own: number[] = [Exit.cannotRun, Exit.notMarked, Exit.sentChanged];
    if (change === undefined || own.includes(failure?.code ?? 0)) return failure;
    const other = failure?.code === Exit.arrivedChanged ? failure.cause : failure;
    const more = other instanceof Failure ? `; ${other.message}` : "";
    // Nobody saw the SYN leave, so this host may have changed it.
    const who = change.after === 0 ? "this host or the path" : "the path";
    const message = `${who} changed ${describe(mark)} to ${describe(markOf(change.to))} ` +
      `between ${hopName(change.after, path, false)} and ${hopName(change.at, path, false)}${more}`;
    return new Failure(Exit.arrivedChanged, message, failure?.hint);
  }
}

/** The packet of this connection that the far end reports, the SYN if it can: as routers see it. */
function reportedByServer(
  { arrived }: Exchange,
): { packet: string; arrived: number } | null {
  if (arrived === null || arrived.isOther) return null;
  const packets = Object.entries({ SYN: arrived.syn, data: arrived.data, ACK: arrived.ack });
  const [packet, tos] = packets.find(([, tos]) => tos !== null)!;
  return { packet, arrived: tos! };
}

/** The row of the hop that came last, below the table's head if it is the first. */
function hopRow({ mark, path, changes, exchange }: Trace, width: number): string {
  const hop = path.at(-1)!;
  const addressWidth = Math.max(15, path[0].address?.length ?? 0);
  const head = `hop  ${"address".padEnd(addressWidth)}     ms  mark there`.slice(0, width);
  const number = String(hop.hop ?? "?").padStart(3);
  let row = `${number}  (no answer)`;
  if (hop.address !== null) {
    const time = shortTime(hop.milliseconds!).padStart(6);
    const start = `${number}  ${hop.address.padEnd(addressWidth)} ${time}`;
    const isChanged = changes.at(-1)?.at === hop.hop && hop.tos !== null;
    const text = `${markThere(hop, mark, exchange)}${isChanged ? "   changed" : ""}`;
    const isWide = start.length + 2 + text.length > width;
    const indent = Math.max(3, Math.min(addressWidth + 12, width - 2 - text.length));
    row = `${start}${isWide ? `\n${" ".repeat(indent)}` : ""}  ${text}`;
  }
  return path.length === 1 ? `${head}\n${row}\n` : `${row}\n`;
}

/** What is known of the mark at a hop that answered. */
function markThere(hop: Hop, mark: Mark, exchange: Exchange | null): string {
  const { tos, evidence, answer } = hop;
  const name = tos === null ? "" : describe(sameDscp(tos, mark.tos) ? mark : markOf(tos));
  if (evidence === "server") {
    return `connected; server reports ${reportedByServer(exchange!)!.packet} ${name}`;
  }
  if (isTarget(hop)) return answer!;
  const there = tos !== null ? name : evidence === "icmp" ? "lower bits kept" : "unknown";
  return answer === "time exceeded" ? there : `${there}; ${answer}`;
}

function hopName(hop: number | null, path: readonly Hop[], withAddress = true): string {
  if (hop === 0) return "this host";
  const found = path.find((other) => other.hop === hop)!, { address } = found;
  // At an unknown distance the answer may be a router's as well.
  if (hop === null && !isTarget(found)) return `${address}, at an unknown distance`;
  const name = hop === null ? "the target" : `hop ${hop}`;
  return withAddress && address !== null ? `${name} (${address})` : name;
}

/** Whether it is the target itself that answered. */
function isTarget({ answer }: Hop): boolean {
  return answer === "connected" || answer === "connection refused";
}

/** What became of a mark, in a word and in a sentence that begins "it was". */
function pathOutcome({ path, changes, exchange }: Trace): { sort: string; text: string } {
  const places = changes.map((change) => {
    const isHere = change.after === 0 && exchange?.sent.wrong != null;
    const place = isHere ? "on this host" : placeOf(change, path);
    return `to ${describe(markOf(change.to))} ${place}`;
  });
  if (places.length > 0) return { sort: "changed", text: `changed ${places.join(", then ")}` };
  const seen = path.findLast(({ tos }) => tos !== null);
  const isWhole = seen?.evidence === "server";
  const far = isWhole ? "all the way" : seen && `as far as ${hopName(seen.hop, path)}`;
  const { sent = NOT_OBSERVED, arrived = null } = exchange ?? {}, later = arrived?.changed;
  const other = sent.wrong !== null
    ? `the request left this host as ${describe(markOf(sent.wrong))}`
    : isWhole && later
    ? `${later.packet} arrived as ${describe(markOf(later.arrived))}`
    : null;
  if (far && other) return { sort: "changed", text: `kept ${far} on the SYN, but ${other}` };
  if (isWhole) {
    const isAll = arrived !== null && coversAllData(arrived, sent);
    const text = isAll ? ": the server reports it" : " on the packets that the server reports";
    return { sort: "kept all the way", text: `kept ${far}${text}` };
  }
  if (seen !== undefined) {
    return { sort: "kept as far as shown", text: `kept ${far}, the last that showed it` };
  }
  const hint = path.findLast(({ evidence }) => evidence === "icmp");
  const text = hint !== undefined
    ? `kept in its lower bits as far as ${hopName(hint.hop, path)}; no more is known`
    : path.some(({ answer }) => answer === "time exceeded")
    ? "not shown by the routers that answered"
    : path[0]?.hop === 1 && isTarget(path[0])
    ? "not shown: the first hop is the target, which does not report it"
    : "not seen: no router answered, nothing is known of the path";
  return { sort: "not shown", text };
}

/** Between which two hops, and which in between do not show the mark. */
function placeOf({ after, at }: Change, path: readonly Hop[]): string {
  const unseen = path.filter(({ hop, tos }) =>
    tos === null && hop !== null && hop > after && hop < (at ?? Infinity)
  );
  const numbers = unseen.map(({ hop }) => hop).join(", ");
  const state = unseen.every(({ answer }) => answer === null) ? "silent" : "unknown";
  const note = numbers === "" ? "" : ` (${state} in between: ${numbers})`;
  return `between ${hopName(after, path)} and ${hopName(at, path)}${note}`;
}

/** Several marks: a table if it fits, what was changed in words, and how many were kept. */
function marksReport(all: readonly Trace[], width: number): string {
  const rows = [["hop", "address", ...all.map(({ mark }) => markLabel(mark))]],
    lines: string[] = [];
  const longest = all.reduce((a, b) => a.path.length < b.path.length ? b : a);
  for (const [at, { hop }] of longest.path.entries()) {
    const hops = all.map(({ path }) => path[at]), answered = hops.filter((hop) => hop?.address);
    const [address = "(no answer)", ...others] = new Set(answered.map(({ address }) => address!));
    const cells = hops.map((hop, column) => {
      if (!hop?.address) return "-";
      if (hop.tos === null) return hop.evidence === "icmp" ? "lower" : "?";
      const { mark } = all[column];
      return sameDscp(hop.tos, mark.tos) ? markLabel(mark) : `${markLabel(markOf(hop.tos))}!`;
    });
    const more = others.length > 0 ? ` +${others.length}` : "";
    rows.push([String(hop ?? "?").padStart(3), `${address}${more}`, ...cells]);
    if (answered.length === 0 || answered.length === hops.length) continue;
    lines.push(
      `Hop ${hop} (${address}) is partly silent: it answered ${answered.length} of ${hops.length} probes.`,
    );
  }
  const changed = all.flatMap(({ mark, path, changes }) =>
    changes.map((change) => ({ mark, place: placeOf(change, path), to: markOf(change.to) }))
  );
  for (const [place, here] of Map.groupBy(changed, ({ place }) => place)) {
    const words = [...Map.groupBy(here, ({ to }) => markLabel(to))].map(([to, marks]) =>
      `${marks.map(({ mark }) => markLabel(mark)).join(", ")} → ${to}`
    );
    lines.push(`B${place.slice(1)}: ${words.join("; ")}`);
  }
  for (const trace of all) {
    const { sort, text } = pathOutcome(trace);
    if (sort !== "changed" || trace.changes.length > 0) continue;
    lines.push(`${markLabel(trace.mark)} was ${text}.`);
  }
  const counts = [...Map.groupBy(all, (trace) => pathOutcome(trace).sort)].map(([sort, traces]) =>
    `${traces.length} ${sort}`
  );
  lines.push(`Of ${plural(all.length, "mark")}: ${counts.join(", ")}.`);
  const widths = rows[0].map((_, at) => Math.max(...rows.map((row) => row[at].length)) + 2);
  const isTable = all.length <= 8 && widths.reduce((sum, each) => sum + each) <= width + 2;
  const table = rows.map((row) =>
    row.map((cell, at) => cell.padEnd(widths[at])).join("").trimEnd()
  );
  return (isTable ? `${table.join("\n")}\n` : "") +
    lines.map((line) => wrap(line, width)).join("");
}

/**
 * Traces the path with each mark, and prints the hops: those of a single mark as they answer.
 *
 * @returns the first failure, a wrong mark before others, or `null`
 */
export async function traces(
  server: Server,
  options: Options,
  request: Requester,
): Promise<Failure | null> {
  const { marks } = options, isMany = marks.length > 1, width = widthOf(Deno.stdout);
  const requestOptions = { ...await requestOptionsOf(options), maxHops: options.maxHops };
  const route = { target: server.target, options: requestOptions, sink: sinkFor(options), request };
  using climb = await climbTo(server.target, requestOptions, isMany);
  const all = marks.map((mark) => new Trace(mark, route, climb));
  const isQuiet = options.json || options.silent;
  using screen = new LiveText(isMany && !isQuiet);
  let begun = 0;
  const result = (interrupted: Failure | null = null) => {
    screen.clear();
    if (options.json) {
      return all.slice(0, begun).map((trace, at) => {
        const failure = trace.failure ?? (at === begun - 1 ? interrupted : null);
        return json(trace.exchange, failure, { ...server, path: trace, url: server.target.url });
      }).join("");
    }
    const known = all.filter(({ path, exchange }) => path.length > 0 || exchange !== null);
    if (isMany) return known.length === 0 ? "" : marksReport(known, width);
    if (all[0].path.length === 0) return "";
    return wrap(`${describe(marks[0])} was ${pathOutcome(all[0]).text}.`, width);
  };
  using _signals = onInterrupt(async (code) => {
    if (Deno.stderr.isTerminal()) toStandardError("\n");
    const current = all[begun - 1]?.exchange;
    if (current?.connection && current.sent === NOT_OBSERVED) {
      current.sent = assessSent(current.connection, current.mark);
    }
    // Standard output may have a reader that has stopped.
    const printing = toStandardOutput(result(new Failure(code, "interrupted"))).catch(() => {});
    await Promise.race([printing, pause(200)]);
    if (current?.connection && !isQuiet && !isMany) {
      toStandardError(
        markedReport(current, server.isBuiltIn) + outcomeReport(current, server.isBuiltIn),
      );
    }
    toStandardError("dscp-get: interrupted\n");
    forcedExit.resolve(code);
  });
  for (const [done, trace] of all.entries()) {
    begun = done + 1;
    screen.update(() => `${done} of ${all.length} marks, Ctrl-C to stop\n`);
    for await (const _hop of trace) {
      if (!isMany && !options.json) await toStandardOutput(hopRow(trace, width));
    }
    if (done === 0) server.checkPresent(trace.exchange!, isMany);
    // Without a permission or libc all others would fail the same way.
    if (trace.failure?.code === Exit.cannotRun) throw trace.failure;
  }
  if (isMany) await askAgain(climb, all, route);
  await toStandardOutput(result());
  if (!isQuiet && !isMany) {
    const exchange = all[0].exchange!, { isBuiltIn } = server;
    toStandardError(markedReport(exchange, isBuiltIn) + outcomeReport(exchange, isBuiltIn));
  }
  const isHidden = !climb.isExact && all[0].path.some(({ answer }) => answer === "time exceeded");
  if (!isQuiet && isHidden) {
    const way = "run as root, or sudo setcap cap_net_raw+ep on a copy of deno";
    lineToStandardError(`hint: to see the whole mark at routers on IPv4, ${way}`);
  }
  const failures = all.flatMap(({ failure }) => failure ?? []);
  const first = failures.reduce(moreSevere, null);
  if (!isMany || first === null) return first;
  const count = `${failures.length} of ${all.length} marks changed or failed`;
  const which = first === failures[0] ? "the first" : "the first change";
  return new Failure(first.code, `${count}; ${which}: ${first.message}`);
}

/** Loads what climbs. @param many for several marks, one after the other */
async function climbTo(
  { host, port }: Target,
  options: RequestOptions,
  many: boolean,
): Promise<Climb> {
  const { Climb } = await import("../ffi/path.ts");
  return new Climb({ hostname: host, port, family: options.family, many });
}

/** Asks the hops again that answered to some marks only, as long as a climb may take. */
async function askAgain(climb: Climb, all: readonly Trace[], { target, options }: Route) {
  const limits = new Limits({ ...options, maxTime: 0 });
  const signal = limits.begin({ ...target, isHttps: false });
  try {
    await climb.reprobe(all.map(({ mark, path }) => ({ tos: mark.tos, path })), signal);
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
  } finally {
    limits.end();
  }
}
