/**
 * Hop by hop: what each router on a path received of a mark.
 *
 * A SYN whose time to live (IPv4) or hop limit (IPv6) runs out makes a router answer with an ICMP
 * message that quotes the header it received (RFC 792, RFC 4443 section 3.3). On IPv6 Linux reports
 * the Traffic Class of the quoted header to any process that asks for it (`IPV6_FLOWINFO_SEND`). On
 * IPv4 it takes a raw ICMP socket, which needs CAP_NET_RAW, raw(7). Without one there is the ToS
 * byte of the ICMP message itself, into which Linux routers copy the mark's lower three bits.
 *
 * @module
 */

import { destination, resolve } from "./dial.ts";
import { TIME_EXCEEDED } from "./icmp.ts";
import { checkPermission, pause } from "./deno.ts";
import { fdOf } from "./fd.ts";
import { type Hop, Prober, type ProbeResult, REFUSED, resultOf } from "./probe.ts";
import { setResetOnClose } from "./probe.ts";
import { formatAddress } from "./sockaddr.ts";

/** Where a path leads, as in `ConnectOptions`. */
export interface ClimbOptions {
  readonly hostname: string;
  readonly port: number;
  readonly family: 4 | 6 | null;
  /** Whether several climbs follow each other; each connection is then reset when it is closed. */
  readonly many: boolean;
  /** Called before silent hops are waited for once more. */
  readonly onWait?: (milliseconds: number) => void;
}

// Milliseconds to wait for a hop: first TIMES the slowest answer so far, then one more try of 1 s.
const LEAST_WAIT = 200, MOST_WAIT = 1000, TIMES = 3;
// For hops that were silent, as traceroute(8) waits.
const LONGEST_WAIT = 5000;
// Time for a SYN and the one or two that the kernel sends after 1 and 3 seconds.
const TARGET_WAIT = 2000, FRESH_WAIT = 4000;
// So many silent hops in a row, and all farther ones are probed at once.
const MOST_SILENT = 4;
// Linux routers send one answer a second, after a burst of six: icmp(7), icmp_ratelimit.
const REST = 1000;

/** How a hop has answered so far. */
interface HopStats {
  answers: number;
  /** Whether a mark passed it without its answer. */
  isPassed: boolean;
  /** When to probe it again, as it probably limits its answers. */
  retryAfter: number;
}

/** Climbs a path, once for each mark; holds the local port and the raw socket meanwhile. */
export class Climb implements Disposable {
  #addresses: string[] = [];
  #prober: Prober | null = null;
  #distance = Infinity;
  /** Whether the target has answered the port of the path. */
  #isReached = false;
  readonly #stats = new Map<number, HopStats>();

  /** Prepares a climb; nothing is opened before the first one. */
  constructor(private readonly options: ClimbOptions) {}

  /** Whether routers on this path can show the whole mark: on IPv4 this takes CAP_NET_RAW. */
  get isExact(): boolean {
    return this.#prober?.isExact ?? false;
  }

  /**
   * Probes the path with one mark, hop after hop; hops that were silent once more, with more time,
   * which are then yielded a second time. Several climbs leave that to {@linkcode Climb.reprobe}.
   *
   * @param tos the byte, 0 to 252, ECN bits zero
   * @param maxHops the largest TTL to try, 1 to 255
   * @param deadline when `signal` aborts, on the clock of `performance.now()`
   * @returns the probe that connected; its hop is not among those yielded
   * @throws {Deno.errors.NotCapable} `--allow-net` does not allow the host and port
   * @throws {Deno.errors.ConnectionRefused | Deno.errors.TimedOut | Error} there is no connection
   */
  async *climb(
    tos: number,
    maxHops: number,
    signal: AbortSignal,
    deadline: number,
  ): AsyncGenerator<Hop, ProbeResult> {
    if (this.#prober === null) await this.#open(signal);
    const silent: number[] = [], late = new Map<number, Hop>();
    let found: ProbeResult | null = null, inRow = 0;
    for (let ttl = 1; ttl <= Math.min(maxHops, this.#distance); ttl++) {
      const reply = await this.#probeHop(ttl, tos, late, signal);
      if (reply.error !== null) {
        const isReached = await this.#isReachable(reply, tos, signal);
        if (!isReached && ttl === 1 && this.#openNext()) {
          ttl = 0;
          continue;
        }
        // The hop rejected the probe, though the target does not.
        const isRefused = isReached && reply.hop.answer === REFUSED;
        const answer = isRefused ? "refused this probe only" : reply.hop.answer;
        if (answer !== null) yield { ...reply.hop, answer };
        if (!isReached) throw reply.error;
        break;
      }
      inRow = reply.hop.answer === null ? inRow + 1 : 0;
      // What lets the mark pass and never answers will not answer other marks either.
      if (inRow === 0) silent.forEach((hop) => this.#statsOf(hop).isPassed = true);
      if (reply.conn !== null) {
        found = reply;
        break;
      }
      yield reply.hop;
      if (inRow > 0) silent.push(ttl);
      if (inRow === MOST_SILENT && late.size === 0) {
        const rest = Array.from({ length: maxHops - ttl }, (_, at) => ttl + 1 + at);
        const hops = [...silent, ...rest].map((ttl) => ({ ttl, tos }));
        const most = this.options.many ? MOST_WAIT : LONGEST_WAIT;
        const wait = Math.min(most, halfway(deadline) - performance.now());
        await this.#scout(hops, late, wait, signal);
      }
    }
    const distance = found?.hop.hop ?? null, by = halfway(deadline);
    if (silent.length > 0 && !this.options.many && by - performance.now() >= LEAST_WAIT) {
      // The probes need its ports.
      found?.conn?.close();
      found = yield* this.#again(silent, tos, late, signal, by);
    }
    if (found === null) {
      const reply = await this.#probeTarget(tos, signal);
      found = { ...reply, hop: { ...reply.hop, hop: distance } };
    }
    if (found.conn !== null) {
      // An ordinary connection again
      if (!this.options.many) setResetOnClose(fdOf(found.conn), false);
      return found;
    }
    if (found.hop.answer !== null) yield found.hop;
    throw found.error ?? new Deno.errors.TimedOut("Connection timed out");
  }

  /**
   * Probes hops of several paths again, each router once a second, as Linux routers answer; one
   * that never answered only if it does so within {@linkcode LONGEST_WAIT} to one mark. What comes
   * of it replaces the hop in its path.
   *
   * @param paths the marks, those that came farthest first, and the hops to probe again
   * @param onStep called after each probe
   */
  async reprobe(
    paths: readonly { tos: number; path: Hop[]; hops: readonly number[] }[],
    signal: AbortSignal,
    onStep: (done: number, all: number) => void,
  ): Promise<void> {
    signal.throwIfAborted();
    const late = new Map<number, Hop>();
    const waiting = new Map<number, { tos: number; path: Hop[] }[]>();
    for (const { tos, path, hops } of paths) {
      for (const ttl of hops) waiting.set(ttl, [...waiting.get(ttl) ?? [], { tos, path }]);
    }
    const unknown = [...waiting].filter(([ttl]) => this.#statsOf(ttl).answers === 0)
      .map(([ttl, [{ tos }]]) => ({ ttl, tos }));
    await this.#scout(unknown, late, LONGEST_WAIT, signal);
    for (const [ttl, hop] of late) {
      if (hop.answer !== null) continue;
      for (const { path } of waiting.get(ttl)!) path[ttl - 1] = hop;
      waiting.delete(ttl);
    }
    const all = [...waiting.values()].reduce((sum, { length }) => sum + length, 0);
    for (let done = 0; waiting.size > 0;) {
      await pause(REST, signal);
      for (const [ttl, [{ tos, path }, ...rest]] of waiting) {
        const { hop } = await this.#prober!.probe(ttl, tos, this.#lateWait(late.get(ttl)), signal);
        if (hop.answer === null || hop.answer === TIME_EXCEEDED) path[ttl - 1] = hop;
        if (rest.length > 0) waiting.set(ttl, rest);
        else waiting.delete(ttl);
        onStep(++done, all);
      }
    }
  }

  /** Probes a hop, and a new one, or the target, once more if it is silent. */
  async #probeHop(ttl: number, tos: number, late: ReadonlyMap<number, Hop>, signal: AbortSignal) {
    const isKnown = this.#stats.has(ttl), isRouter = ttl < this.#distance;
    const stats = this.#statsOf(ttl), now = performance.now(), scouted = late.get(ttl);
    if (scouted?.answer === null) return resultOf({ ttl, started: now }, scouted);
    const isMute = stats.isPassed && stats.answers === 0;
    if (isRouter && (isMute || now < stats.retryAfter)) {
      return resultOf({ ttl, started: now }, {});
    }
    const waits = isKnown && isRouter ? [this.#wait] : [this.#wait, MOST_WAIT];
    let reply: ProbeResult;
    for (const wait of waits) {
      reply = await this.#prober!.probe(ttl, tos, wait, signal);
      if (reply.hop.answer !== null || reply.error !== null) {
        stats.answers++;
        stats.retryAfter = 0;
        if (reply.conn !== null) [this.#distance, this.#isReached] = [ttl, true];
        return reply;
      }
      stats.retryAfter = performance.now() + REST;
    }
    return reply!;
  }

  /**
   * Probes hops all at once, each from a port of its own, only to learn which answer, and how late:
   * balanced load may make these probes take another path.
   */
  async #scout(
    hops: readonly { ttl: number; tos: number }[],
    late: Map<number, Hop>,
    wait: number,
    signal: AbortSignal,
  ): Promise<void> {
    if (hops.length > 0) this.options.onWait?.(wait);
    await Promise.all(hops.map(async ({ ttl, tos }) => {
      const { hop, conn } = await this.#prober!.probe(ttl, tos, wait, signal, true);
      late.set(ttl, hop);
      if (conn === null) return;
      conn.close();
      this.#distance = Math.min(this.#distance, ttl);
    }));
  }

  /** Probes silent hops again that answer other ports. @returns the target, if it is one */
  async *#again(
    silent: readonly number[],
    tos: number,
    late: Map<number, Hop>,
    signal: AbortSignal,
    by: number,
  ): AsyncGenerator<Hop, ProbeResult | null> {
    const rest = silent.filter((ttl) => !late.has(ttl)).map((ttl) => ({ ttl, tos }));
    await this.#scout(rest, late, Math.min(LONGEST_WAIT, by - performance.now()), signal);
    let hasRested = false;
    for (const ttl of silent) {
      const scouted = late.get(ttl)!;
      if (scouted.answer === null) yield scouted;
      if (scouted.answer === null || ttl > this.#distance || performance.now() > by) continue;
      if (!hasRested) await pause(REST, signal);
      hasRested = true;
      const reply = await this.#prober!.probe(ttl, tos, this.#lateWait(scouted), signal);
      if (reply.conn !== null) return reply;
      yield reply.hop;
    }
    return null;
  }

  /** Whether the target answers the default TTL, as a firewall may reject small ones alone. */
  async #isReachable({ hop }: ProbeResult, tos: number, signal: AbortSignal): Promise<boolean> {
    if (hop.answer === null) return false;
    const { conn } = await this.#probeTarget(tos, signal);
    conn?.close();
    return conn !== null;
  }

  /** Probes the target; also from a fresh port, as a firewall may pass one SYN of two ports. */
  async #probeTarget(tos: number, signal: AbortSignal): Promise<ProbeResult> {
    const reply = await this.#prober!.probe(null, tos, TARGET_WAIT, signal);
    if (reply.hop.answer !== null || reply.error !== null || this.#isReached) return reply;
    return await this.#prober!.probe(null, tos, FRESH_WAIT, signal, true);
  }

  #statsOf(ttl: number): HopStats {
    const stats = this.#stats.get(ttl) ?? { answers: 0, isPassed: false, retryAfter: 0 };
    this.#stats.set(ttl, stats);
    return stats;
  }

  /** How long to wait for an answer, in milliseconds: a second for the first. */
  get #wait(): number {
    const { slowest } = this.#prober!;
    return slowest === 0 ? MOST_WAIT : Math.min(MOST_WAIT, Math.max(LEAST_WAIT, TIMES * slowest));
  }

  /** How long to wait for a hop that answered another port, or none. */
  #lateWait(scouted?: Hop): number {
    return Math.min(LONGEST_WAIT, Math.max(MOST_WAIT, TIMES * (scouted?.milliseconds ?? 0)));
  }

  async #open(signal: AbortSignal): Promise<void> {
    const { hostname, family } = this.options;
    checkPermission(formatAddress(this.options));
    this.#addresses = await resolve(hostname, family, signal);
    this.#openNext();
  }

  /** Takes a local port, and a raw socket, for the next address. @returns false after the last */
  #openNext(): boolean {
    const hostname = this.#addresses.shift();
    if (hostname === undefined) return false;
    this[Symbol.dispose]();
    this.#stats.clear();
    [this.#distance, this.#isReached] = [Infinity, false];
    this.#prober = new Prober(destination(hostname, this.options.port));
    return true;
  }

  /** Gives the local port back. Connections stay. */
  [Symbol.dispose](): void {
    this.#prober?.[Symbol.dispose]();
    this.#prober = null;
  }
}

/** The time in the middle between now and a deadline. */
function halfway(deadline: number): number {
  const now = performance.now();
  return now + (deadline - now) / 2;
}
