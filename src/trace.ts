/**
 * Hop by hop: what each router received of a mark. `path_text.ts` has the words for it.
 *
 * @module
 */

import { MarkedConn } from "../ffi/conn.ts";
import { pause } from "../ffi/deno.ts";
import type { Mark } from "../ffi/dscp.ts";
import { TIME_EXCEEDED } from "../ffi/icmp.ts";
import { Climb, type ClimbOptions } from "../ffi/path.ts";
import type { Hop, ProbeResult } from "../ffi/probe.ts";
import type { Change, Exchange, Requester, RequestOptions, Sink } from "./exchange.ts";
import { Exit, Failure } from "./failure.ts";
import { Limits } from "./limits.ts";
import { DEFAULTS, type GetOptions, MAX_HOPS, type Options, traceTimeout } from "./options.ts";
import { REQUEST_DEFAULTS, requestOptionsOf, withDefaults } from "./options.ts";
import { lineToStandardError, LiveText, onInterrupt, sinkFor, widthOf } from "./output.ts";
import { toStandardError, toStandardOutput } from "./output.ts";
import { changesOf, hopRow, openHops, pathFailure, pathReport } from "./path_text.ts";
import { reportedPacket, shortSeconds } from "./path_text.ts";
import { json, markedReport, outcomeReport } from "./report.ts";
import type { Server } from "./server.ts";
import type { Target } from "./target.ts";
import { moreSevere } from "./verdict.ts";

/** How {@linkcode trace} asks; `connectTimeout` is for the path (60, or `maxTime` if less). */
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
  /** Of several traces, one after the other; else a trace opens its own. */
  readonly tools?: Tools;
}

/** What climbs, and the time limits of a path and of the request behind it. */
interface Tools {
  readonly climb: Climb;
  readonly limits: Limits;
  readonly requestLimits: Limits;
}

function toolsFor(
  { host: hostname, port }: Target,
  options: RequestOptions,
  more: Pick<ClimbOptions, "many" | "onWait">,
): Tools {
  return {
    climb: new Climb({ hostname, port, family: options.family, ...more }),
    limits: new Limits({ ...options, maxTime: 0 }),
    requestLimits: new Limits(options),
  };
}

/** The options of {@linkcode TraceOptions} with the defaults for those left out. */
export function traceOptionsOf(options: TraceOptions) {
  const path = { maxHops: DEFAULTS.maxHops, connectTimeout: traceTimeout(options.maxTime) };
  const all = withDefaults({ ...REQUEST_DEFAULTS, dscp: "EF", ...path }, options);
  if (all.maxHops >= 1 && all.maxHops <= MAX_HOPS) return all;
  throw new RangeError(`maxHops is a number from 1 to ${MAX_HOPS}, not ${all.maxHops}`);
}

/** One trace; iterate it once to run it. Yields each hop as it answers, the target last. */
export class Trace implements AsyncIterable<Hop> {
  /** The hops so far. */
  readonly path: Hop[] = [];
  /** The request, once the hops are there. */
  exchange: Exchange | null = null;
  /** Whether the target answered only another port of this host than the probes had. */
  isFreshPort = false;
  // Not a parameter property, which JSON would show.
  readonly #route: Route;

  /** For {@linkcode trace}. */
  constructor(readonly mark: Mark, route: Route) {
    this.#route = route;
  }

  /** Where the mark was changed, nearest first. */
  get changes(): Change[] {
    return changesOf(this);
  }

  /** What went wrong: 102 if a hop received another mark, unless it was changed on this host. */
  get failure(): Failure | null {
    return pathFailure(this);
  }

  /** Climbs the path, then makes the request on the connection of the last probe. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Hop, void> {
    const { target, sink, request, options: { maxHops, ...given } } = this.#route;
    const options = { ...given, markSyn: true };
    const tools = this.#route.tools ?? toolsFor(target, options, { many: false });
    const { climb, limits, requestLimits } = tools;
    using _own = this.#route.tools === undefined ? climb : null;
    const started = performance.now();
    const deadline = started + 1000 * (options.connectTimeout || Infinity);
    const hops = climb.climb(this.mark.tos, maxHops, limits.begin(target), deadline);
    let last: ProbeResult | null = null, connect: () => Promise<MarkedConn>;
    try {
      let step;
      while (!(step = await hops.next()).done) {
        const { hop } = step.value;
        if (hop === null) this.path.push(step.value);
        else this.path[hop - 1] = step.value;
        yield step.value;
      }
      const { conn, isFreshPort } = last = step.value;
      this.isFreshPort = isFreshPort;
      connect = () => Promise.resolve(MarkedConn.adopt(conn!));
    } catch (error) {
      connect = () => Promise.reject(error);
    } finally {
      limits.end();
    }
    const context = { limits: requestLimits, started: last?.started ?? started, connect };
    this.exchange = await request(target, this.mark, options, sink, context);
    if (last === null) return;
    const tos = reportedPacket(this.exchange.arrived)?.tos ?? null;
    const hop: Hop = { ...last.hop, tos, evidence: tos === null ? null : "server" };
    // Hops beyond a slow target were recorded as silent, but do not exist.
    if (hop.hop !== null) this.path.splice(hop.hop - 1);
    this.path.push(hop);
    yield hop;
  }
}

/**
 * Traces the path with each mark, and prints the hops: those of a single mark as they answer.
 *
 * @returns the first failure, a wrong mark before others, or `null`
 */
export async function runTrace(
  server: Server,
  options: Options,
  request: Requester,
): Promise<Failure | null> {
  const { marks } = options, { target } = server, isMany = marks.length > 1;
  const requestOptions = { ...await requestOptionsOf(options), maxHops: options.maxHops };
  const isQuiet = options.json || options.silent, width = widthOf(Deno.stdout);
  using screen = new LiveText(!isQuiet);
  const onWait = (milliseconds: number) =>
    screen.update(() => `waiting ${shortSeconds(milliseconds)} for silent hops, Ctrl-C to stop\n`);
  const tools = toolsFor(target, requestOptions, { many: isMany, onWait });
  const { limits, requestLimits } = tools, interrupted = Promise.withResolvers<void>();
  using climb = tools.climb;
  using _signals = onInterrupt((code) => {
    if (Deno.stderr.isTerminal()) toStandardError("\n");
    for (const each of [limits, requestLimits]) each.stop(new Failure(code, "interrupted"));
    interrupted.resolve();
  });
  // Standard output may have a reader that has stopped.
  const print = (text: string) => {
    screen.clear();
    return Promise.race([toStandardOutput(text), interrupted.promise.then(() => pause(200))]);
  };
  const route = { target, options: requestOptions, sink: sinkFor(options), request, tools };
  const all = marks.map((mark) => new Trace(mark, route));
  for (const [done, trace] of all.entries()) {
    const show = (hop: string) =>
      screen.update(() => `${done + 1} of ${all.length} marks${hop}, Ctrl-C to stop\n`);
    if (!isMany && !options.json) await printRows(trace, width, print);
    else {
      show("");
      for await (const { hop } of trace) show(`, hop ${hop ?? "?"}`);
    }
    if (limits.stopped !== null) break;
    if (done === 0) await server.throwIfGone(trace.exchange!, isMany);
    // Without a permission or libc all others would fail the same way.
    if (trace.failure?.code === Exit.cannotRun) throw trace.failure;
  }
  if (isMany) await reprobe(all, target, tools, screen);
  const known = all.filter(({ exchange }) => exchange !== null);
  const context = { ...server, url: target.url };
  const lines = known.map((path) => json(path.exchange, path.failure, { ...context, path }));
  await print(options.json ? lines.join("") : pathReport(known, isMany, width));
  if (!isQuiet && !isMany) {
    const { exchange } = all[0], { isBuiltIn } = server;
    toStandardError(markedReport(exchange!, isBuiltIn) + outcomeReport(exchange!));
  }
  if (limits.stopped !== null) return limits.stopped;
  const isHidden = !climb.isExact && all[0].path.some(({ answer }) => answer === TIME_EXCEEDED);
  if (!isQuiet && isHidden) {
    const way = "run as root, or sudo setcap cap_net_raw+ep on a copy of deno";
    lineToStandardError(`hint: to see the whole mark at routers on IPv4, ${way}`);
  }
  return isMany ? marksFailure(all) : all[0].failure;
}

/** Prints hops as they answer, those that were silent again only if they do. */
async function printRows(trace: Trace, width: number, print: (text: string) => Promise<void>) {
  let rows = 0;
  for await (const hop of trace) {
    if (hop.answer !== null || hop.hop! > rows) await print(hopRow(trace, hop, width, rows === 0));
    rows = Math.max(rows, hop.hop ?? 1);
  }
}

/** Probes silent hops again that can change what is said of a mark, as long as a climb may take. */
async function reprobe(
  all: readonly Trace[],
  target: Target,
  { climb, limits }: Tools,
  screen: LiveText,
): Promise<void> {
  const reach = ({ path }: Trace) => path.findLastIndex(({ answer }) => answer !== null);
  const paths = all.toSorted((a, b) => reach(b) - reach(a))
    .map((trace) => ({ tos: trace.mark.tos, path: trace.path, hops: openHops(trace) }));
  try {
    await climb.reprobe(paths, limits.begin(target), (done, all) => {
      screen.update(() => `${done} of ${all} silent hops asked again, Ctrl-C to stop\n`);
    });
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
  } finally {
    limits.end();
  }
}

/** The first failure of several traces, a wrong mark before others, with their number. */
function marksFailure(all: readonly Trace[]): Failure | null {
  const failures = all.flatMap(({ failure }) => failure ?? []);
  const first = failures.reduce<Failure | null>(moreSevere, null);
  if (first === null) return null;
  const count = `${failures.length} of ${all.length} marks changed or failed`;
  const which = first === failures[0] ? "the first" : "the first change";
  return new Failure(first.code, `${count}; ${which}: ${first.message}`);
}
