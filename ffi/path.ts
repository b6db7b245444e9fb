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

import { checkPermission } from "./permission.ts";
import { destination, DialedConn, resolve, startConnect } from "./dial.ts";
import { denoError, orDenoError } from "./errors.ts";
import { Socket } from "./fd.ts";
import { type IcmpError, icmpMeaning, keptLowerBits, TIME_EXCEEDED } from "./icmp.ts";
import { parseIcmpError, parseQuote } from "./icmp.ts";
import * as libc from "./libc.ts";
import { setTosAt } from "./mark.ts";
import { getOption, setOption, setOptionInts } from "./option.ts";
import { type Ends, handshakeTime, openPort, openRaw, probeEnds } from "./probe.ts";
import { rawPackets, readErrorQueue, setProbing } from "./probe.ts";
import { nextEvent, unwatch, watch } from "./poll.ts";
import { AF_INET, AF_INET6, formatAddress, SOCKADDR_SIZE } from "./sockaddr.ts";
import { pause } from "./wait.ts";

/** What one hop answered to one mark. */
export interface Hop {
  /** How many hops away it is, from 1; `null` for a target at an unknown distance. */
  readonly hop: number | null;
  /** The address that answered; `null` if none did. */
  readonly address: string | null;
  /** The time until the answer; `null` if there was none. */
  readonly milliseconds: number | null;
  /** The byte with which packets reached it, 0 to 255; `null` if unknown. */
  readonly tos: number | null;
  /** The ToS byte of the ICMP message itself; `null` on IPv6, and if there was none. */
  readonly icmpTos: number | null;
  /**
   * What shows the mark: the header that a router quotes, or what the server reports, both of which
   * give `tos`; or `icmpTos`, which shows that the mark's lower three bits were kept.
   */
  readonly evidence: "quote" | "server" | "icmp" | null;
  /** `time exceeded`, `connected`, `connection refused`, or what else it answered. */
  readonly answer: string | null;
}

/** What one probe found. */
export interface ProbeResult {
  readonly hop: Hop;
  /** The connection, if the probe came through: with the default TTL again. */
  readonly conn: DialedConn | null;
  /** Why the climb cannot go beyond this hop; `null` if it may. */
  readonly error: Error | null;
  /** When the probe left, on the clock of `performance.now()`. */
  readonly started: number;
}

// ─── The climb ──────────────────────────────────────────────────────────────────────────────────

/** Where a path leads, as in `ConnectOptions`. */
export interface ClimbOptions {
  readonly hostname: string;
  readonly port: number;
  readonly family: 4 | 6 | null;
  /** Resets connections when they are closed, so that the next can have the same ports at once. */
  readonly many: boolean;
}

// Milliseconds to wait for a hop: at first, then some times the slowest answer so far.
const FIRST_WAIT = 1000, LEAST_WAIT = 200, MOST_WAIT = 1000, TIMES = 3;
// Time for a SYN and the two that the kernel sends after 1 and 3 seconds.
const TARGET_WAIT = 4000;
const MOST_SILENT = 8;
// Linux routers send one answer a second, after a burst of six: icmp(7), icmp_ratelimit.
const REST = 1000;

/** A SYN that waits for its answer; `ttl` is `null` for the default, which reaches the target. */
type Probe = Readonly<{ fd: number; ttl: number | null; tos: number; started: number }>;

/** Climbs a path, once for each mark; holds the local port and the raw socket meanwhile. */
export class Climb implements Disposable {
  #addresses: string[] = [];
  #ends: Ends | null = null;
  /** The sockets that keep the local port while no probe has it, and that receive ICMP. */
  #anchor: number | null = null;
  #raw: number | null = null;
  #slowest = 0;
  #distance = Infinity;
  /** How each hop has answered; one that was silent probably limits its answers for a while. */
  readonly #stats = new Map<number, { answers: number; silences: number; retryAfter: number }>();

  /** Prepares a climb; nothing is opened before the first one. */
  constructor(private readonly options: ClimbOptions) {}

  /** Whether routers on this path can show the whole mark: on IPv4 this takes CAP_NET_RAW. */
  get isExact(): boolean {
    return this.#raw !== null || this.#ends?.family === AF_INET6;
  }

  /**
   * Probes the path with one mark, hop after hop.
   *
   * @param tos the byte, 0 to 252, ECN bits zero
   * @param maxHops the largest TTL to try, 1 to 255
   * @returns the probe that connected; its hop is not among those yielded
   * @throws {Deno.errors.NotCapable} `--allow-net` does not allow the host and port
   * @throws {Deno.errors.ConnectionRefused | Deno.errors.TimedOut | Error} there is no connection
   */
  async *climb(
    tos: number,
    maxHops: number,
    signal: AbortSignal,
  ): AsyncGenerator<Hop, ProbeResult> {
    if (this.#ends === null) {
      const { hostname, family } = this.options;
      checkPermission(formatAddress(this.options));
      this.#addresses = await resolve(hostname, family, signal);
      this.#openNext();
    }
    let silent = 0;
    for (let ttl = 1; ttl <= maxHops && silent < MOST_SILENT; ttl++) {
      const reply = await this.#probeHop(ttl, tos, signal);
      if (reply.conn !== null) return reply;
      if (reply.error !== null && ttl === 1 && this.#openNext()) {
        ttl = 0;
        continue;
      }
      if (reply.hop.answer !== null || reply.error === null) yield reply.hop;
      if (reply.error !== null) throw reply.error;
      const hasAnswered = (this.#stats.get(ttl)?.answers ?? 0) > 0;
      silent = hasAnswered ? 0 : silent + 1;
    }
    const reply = await this.#probe(null, tos, TARGET_WAIT, signal);
    if (reply.conn !== null) return reply;
    if (reply.hop.answer !== null) yield reply.hop;
    throw reply.error ?? new Deno.errors.TimedOut("Connection timed out");
  }

  /**
   * Asks again, once for each mark, the hops that have answered to some of several marks; a second
   * apart, as that is how often Linux routers answer. What they answer replaces their hop.
   */
  async reprobe(paths: readonly { tos: number; path: Hop[] }[], signal: AbortSignal) {
    const waiting = new Map<number, { tos: number; path: Hop[] }[]>();
    for (const [ttl, { answers }] of this.#stats) {
      if (answers === 0 || ttl >= this.#distance) continue;
      const silent = paths.filter(({ path }) => path[ttl - 1]?.answer === null);
      if (silent.length > 0) waiting.set(ttl, silent);
    }
    while (waiting.size > 0) {
      await pause(REST, signal);
      signal.throwIfAborted();
      for (const [ttl, [{ tos, path }, ...rest]] of waiting) {
        const { hop } = await this.#probe(ttl, tos, this.#wait, signal);
        if (hop.answer === TIME_EXCEEDED) path[ttl - 1] = hop;
        if (rest.length > 0) waiting.set(ttl, rest);
        else waiting.delete(ttl);
      }
    }
  }

  /** Probes a hop, and a new one, or the target, once more if it is silent. */
  async #probeHop(ttl: number, tos: number, signal: AbortSignal): Promise<ProbeResult> {
    const known = this.#stats.get(ttl), isRouter = ttl < this.#distance;
    const stats = known ?? { answers: 0, silences: 0, retryAfter: 0 };
    this.#stats.set(ttl, stats);
    const neverAnswers = stats.answers === 0 && stats.silences > 2;
    if (isRouter && (neverAnswers || performance.now() < stats.retryAfter)) {
      return { hop: { ...SILENT, hop: ttl }, conn: null, error: null, started: 0 };
    }
    for (let tries = known && isRouter ? 1 : 2;; tries--) {
      const reply = await this.#probe(ttl, tos, this.#wait, signal);
      if (reply.hop.answer !== null || reply.error !== null) {
        stats.answers++;
        if (reply.conn !== null) this.#distance = ttl;
        return reply;
      }
      stats.silences++;
      stats.retryAfter = performance.now() + REST;
      if (tries === 1) return reply;
    }
  }

  /** How long to wait for an answer, in milliseconds. */
  get #wait(): number {
    if (this.#slowest === 0) return FIRST_WAIT;
    return Math.min(MOST_WAIT, Math.max(LEAST_WAIT, TIMES * this.#slowest));
  }

  /** Sends one SYN and waits for its answer. @param ttl `null` for the default */
  async #probe(ttl: number | null, tos: number, wait: number, signal: AbortSignal) {
    signal.throwIfAborted();
    const fd = orDenoError(libc.socket(this.#ends!.family));
    let reply: ProbeResult | null = null;
    try {
      const probe = { fd, ttl, tos, started: this.#prepare(fd, ttl ?? -1, tos) };
      const result = startConnect(fd, this.#ends!.remote);
      watch(fd);
      if (result !== -libc.EINPROGRESS) return resultOf(probe, {}, denoError(-result));
      while ((reply = this.#connected(probe) ?? this.#refused(probe)) === null) {
        const rest = wait - (performance.now() - probe.started);
        if (rest <= 0) return resultOf(probe, {});
        await eventWithin(fd, rest, signal);
        signal.throwIfAborted();
      }
      return reply;
    } finally {
      if (!reply?.conn) {
        unwatch(fd);
        libc.close(fd);
      }
    }
  }

  /** Makes a socket a probe that has not left yet. @returns `performance.now()` */
  #prepare(fd: number, ttl: number, tos: number): number {
    const { family, local } = this.#ends!;
    setOption(fd, libc.SO_REUSEADDR, 1);
    orDenoError(libc.bind(fd, local));
    setProbing(fd, family, true, ttl);
    setTosAt(fd, family, tos);
    for (const _old of rawPackets(this.#raw)) { /* about earlier probes */ }
    return performance.now();
  }

  /** The connection, if the probe came through; else `null`. */
  #connected(probe: Probe): ProbeResult | null {
    const { family, address } = this.#ends!, { fd, started } = probe;
    const remote = new Uint8Array(SOCKADDR_SIZE), local = new Uint8Array(SOCKADDR_SIZE);
    if (libc.getpeername(fd, remote) < 0) return null;
    orDenoError(libc.getsockname(fd, local));
    const milliseconds = this.#time(started, handshakeTime(fd));
    setProbing(fd, family, false, -1);
    // struct linger { int l_onoff; int l_linger; }, socket(7)
    if (this.options.many) setOptionInts(fd, libc.SO_LINGER, new Int32Array([1, 0]));
    const conn = new DialedConn(new Socket(fd, family, local, remote));
    return { ...resultOf(probe, { address, milliseconds, answer: "connected" }), conn };
  }

  /** What a router or the target answered instead of connecting; `null` if nothing has come yet. */
  #refused(probe: Probe): ProbeResult | null {
    const { fd, ttl, tos, started } = probe;
    for (let message; (message = readErrorQueue(fd)) !== null;) {
      const error = parseIcmpError(message);
      if (error === null) continue;
      const { router, received } = error, answer = icmpMeaning(error);
      const sent = performance.timeOrigin + started;
      const milliseconds = this.#time(started, received === null ? 0 : received - sent);
      const hop = { address: router, milliseconds, answer, ...this.#evidence(error, tos) };
      if (answer === TIME_EXCEEDED && ttl !== null) return resultOf(probe, hop);
      const loop = answer === TIME_EXCEEDED ? ", as in a routing loop" : "";
      return resultOf(probe, hop, new Error(`${router} answers: ${answer}${loop}`));
    }
    const errno = getOption(fd, libc.SO_ERROR);
    if (errno === 0) return null;
    if (errno === libc.ECONNREFUSED) {
      const { address } = this.#ends!, milliseconds = this.#time(started);
      const hop = { address, milliseconds, answer: "connection refused" };
      return resultOf(probe, hop, denoError(errno));
    }
    // An error without its ICMP message shows nothing.
    return resultOf(probe, {}, ttl === null ? denoError(errno) : null);
  }

  /** Milliseconds from a probe to its answer: the kernel's, if known; ours include compiling. */
  #time(started: number, known = 0): number {
    const elapsed = performance.now() - started;
    const milliseconds = known > 0 && known < elapsed ? known : elapsed;
    this.#slowest = Math.max(this.#slowest, milliseconds);
    return milliseconds;
  }

  /** What an ICMP error shows of the mark. */
  #evidence(error: IcmpError, tos: number): Pick<Hop, "tos" | "icmpTos" | "evidence"> {
    if (error.tos !== null) return { tos: error.tos, icmpTos: null, evidence: "quote" };
    // The kernel gives the packet to raw sockets before it queues the error.
    for (const packet of rawPackets(this.#raw)) {
      const quote = parseQuote(packet, error, this.#ends!.remote);
      if (quote !== null) return { ...quote, evidence: "quote" };
    }
    const { icmpTos } = error;
    const isKept = icmpTos !== null && keptLowerBits(tos, icmpTos);
    return { tos: null, icmpTos, evidence: isKept ? "icmp" : null };
  }

  /** Takes a local port, and a raw socket, for the next address. @returns false after the last */
  #openNext(): boolean {
    const hostname = this.#addresses.shift();
    if (hostname === undefined) return false;
    const ends = probeEnds(destination(hostname, this.options.port));
    this[Symbol.dispose]();
    this.#stats.clear();
    [this.#slowest, this.#distance] = [0, Infinity];
    this.#anchor = openPort(ends);
    this.#ends = ends;
    if (ends.family === AF_INET) this.#raw = openRaw();
    return true;
  }

  /** Gives the local port back. Connections stay. */
  [Symbol.dispose](): void {
    for (const fd of [this.#anchor, this.#raw]) if (fd !== null) libc.close(fd);
    this.#anchor = this.#raw = null;
  }
}

const NOTHING = { address: null, milliseconds: null, tos: null, icmpTos: null };
const SILENT: Hop = { ...NOTHING, hop: null, evidence: null, answer: null };

function resultOf({ ttl, started }: Probe, hop: Partial<Hop>, error: Error | null = null) {
  return { hop: { ...SILENT, ...hop, hop: ttl }, conn: null, error, started };
}

/** Waits for an event of a descriptor, at most so many milliseconds, or until `signal` aborts. */
async function eventWithin(fd: number, milliseconds: number, signal: AbortSignal): Promise<void> {
  const over = new AbortController(), either = AbortSignal.any([signal, over.signal]);
  await Promise.race([nextEvent(fd), pause(milliseconds, either)]);
  over.abort();
}
