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

import type { ConnectOptions } from "./conn.ts";
import { findControl, parseControl } from "./arrived.ts";
import { checkPermission, destination, DialedConn, resolve } from "./dial.ts";
import * as libc from "./libc.ts";
import { setTos } from "./mark.ts";
import { nextEvent, unwatch, watch } from "./poll.ts";
import {
  AF_INET,
  AF_INET6,
  decode,
  formatAddress,
  headerAddress,
  sameBytes,
  SOCKADDR_SIZE,
} from "./sockaddr.ts";

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
  readonly outerTos: number | null;
  /**
   * What shows the mark: the header that a router quotes, or what the server reports, both of which
   * give `tos`; or `outerTos`, which shows that the mark's lower three bits were kept.
   */
  readonly evidence: "quote" | "server" | "outer" | null;
  /** `time exceeded`, `connected`, `connection refused`, or what else it answered. */
  readonly answer: string | null;
}

/** What one probe found. */
export interface ProbeResult {
  /** The hop. */
  readonly hop: Hop;
  /** The connection, if the probe came through: with the default TTL again. */
  readonly conn: DialedConn | null;
  /** Why the climb cannot go beyond this hop; `null` if it may. */
  readonly error: Error | null;
  /** When the probe left, as `performance.now()` has it. */
  readonly started: number;
}

// ─── What the kernel hands over ─────────────────────────────────────────────────────────────────

/** An ICMP error about a probe, as the socket's error queue has it. */
export interface IcmpError {
  /** 4 for ICMP, 6 for ICMPv6. */
  readonly version: 4 | 6;
  /** The type and code, RFC 792 and RFC 4443. */
  readonly type: number;
  /** See {@linkcode IcmpError.type}. */
  readonly code: number;
  /** The address of the router. */
  readonly router: string;
  /** The start of the quoted TCP header: ports and sequence number; perhaps less. */
  readonly transport: Uint8Array;
  /** The Traffic Class of the header that the router quotes; `null` on IPv4. */
  readonly tos: number | null;
  /** The ToS byte of the ICMP message itself; `null` on IPv6. */
  readonly outerTos: number | null;
  /** When it came in, in milliseconds since 1970; `null` if the kernel does not say. */
  readonly received: number | null;
}

/**
 * Reads a message of an error queue: among the control messages `struct sock_extended_err` with the
 * router's address behind it, ip(7); in the name's `sin6_flowinfo` that of the quoted header.
 *
 * @returns `null` if it is no whole ICMP error: nothing is known then
 */
export function parseIcmpError({ name, control, data, flags }: libc.Message): IcmpError | null {
  if ((flags & libc.MSG_CTRUNC) !== 0) return null;
  const SO_EE_ORIGIN_ICMP = 2, SO_EE_ORIGIN_ICMP6 = 3, SIZE = 16;
  const error4 = findControl(control, libc.IP_RECVERR);
  const error6 = findControl(control, libc.IPV6_RECVERR);
  const error = error4 ?? error6, isIPv4 = error === error4;
  if (error === null || error.length < SIZE + (isIPv4 ? 16 : SOCKADDR_SIZE)) return null;
  const [, , , , origin, type, code] = error, router = error.subarray(SIZE);
  if (origin !== (isIPv4 ? SO_EE_ORIGIN_ICMP : SO_EE_ORIGIN_ICMP6)) return null;
  if (router[0] !== (isIPv4 ? AF_INET : AF_INET6) || router[1] !== 0) return null;
  const hasFlow = !isIPv4 && name.length >= SOCKADDR_SIZE && name[0] === AF_INET6;
  return {
    version: isIPv4 ? 4 : 6,
    type,
    code,
    router: decode(router).hostname,
    transport: data.subarray(0, 8),
    // sin6_flowinfo is in network order: 4 bits unused, the class, 20 bits of flow label
    tos: hasFlow ? (name[4] & 0x0f) << 4 | name[5] >> 4 : null,
    outerTos: isIPv4 ? parseControl(control, libc.IP_TOS) : null,
    received: timeOf(findControl(control, libc.SO_TIMESTAMPNS)),
  };
}

/** Milliseconds of a `struct timespec { time_t tv_sec; long tv_nsec; }`. */
function timeOf(timespec: Uint8Array | null): number | null {
  if (timespec === null || timespec.length < 16) return null;
  const view = new DataView(timespec.buffer, timespec.byteOffset, timespec.length);
  return Number(view.getBigInt64(0, true)) * 1000 + Number(view.getBigInt64(8, true)) / 1e6;
}

/**
 * Reads an IPv4 packet of a raw ICMP socket: the ToS bytes of the header that the router quotes and
 * of the ICMP message itself.
 *
 * @param error the same message from the error queue, by which the kernel found whose probe it is
 * @param remote where the probe was sent to, as a `sockaddr_in`
 * @returns `null` if the packet is another one
 */
export function parseQuote(
  packet: Uint8Array,
  error: IcmpError,
  remote: Uint8Array,
): { readonly tos: number; readonly outerTos: number } | null {
  // RFC 791 section 3.1: the length of a header is in its first byte, in words.
  const headerAt = (at: number, protocol: number): number | null => {
    const end = at + (packet[at] & 0x0f) * 4;
    const isWhole = at + 20 <= packet.length && end >= at + 20 && end + 8 <= packet.length;
    return isWhole && packet[at] >> 4 === 4 && packet[at + 9] === protocol ? end : null;
  };
  const icmp = headerAt(0, libc.IPPROTO_ICMP);
  if (icmp === null || packet[icmp] !== error.type || packet[icmp + 1] !== error.code) return null;
  if (packet.subarray(12, 16).join(".") !== error.router) return null;
  const quote = icmp + 8, tcp = headerAt(quote, libc.IPPROTO_TCP);
  if (tcp === null || !sameBytes(packet, quote + 16, remote, 4, 4)) return null;
  const { transport } = error;
  if (transport.length < 8 || !sameBytes(packet, tcp, transport, 0, 8)) return null;
  return { tos: packet[quote + 1], outerTos: packet[1] };
}

/** The meaning of an ICMP error in words: RFC 792, RFC 1812 section 5.2.7.1, RFC 4443 section 3. */
export function icmpMeaning({ version, type, code }: Pick<IcmpError, "version" | "type" | "code">) {
  const [exceeded, unreachable, codes] = version === 4
    ? [11, 3, UNREACHABLE_4] as const
    : [3, 1, UNREACHABLE_6] as const;
  if (type === exceeded && code === 0) return TIME_EXCEEDED;
  const known = type === unreachable ? codes[code] : undefined;
  return known ?? `ICMP${version === 6 ? "v6" : ""} type ${type} code ${code}`;
}

const TIME_EXCEEDED = "time exceeded";

const UNREACHABLE_4: Record<number, string> = {
  0: "network unreachable",
  1: "host unreachable",
  2: "protocol unreachable",
  3: "port unreachable",
  6: "network unknown",
  7: "host unknown",
  9: "network administratively prohibited",
  10: "host administratively prohibited",
  11: "network unreachable for this ToS",
  12: "host unreachable for this ToS",
  13: "administratively prohibited",
};

const UNREACHABLE_6: Record<number, string> = {
  0: "no route",
  1: "administratively prohibited",
  2: "beyond scope of source address",
  3: "address unreachable",
  4: "port unreachable",
  5: "source address failed policy",
  6: "reject route",
};

/** Whether the ToS byte of an ICMP message shows that the lower bits of a mark were still there. */
export function keptLowerBits(tos: number, outerTos: number): boolean {
  // A Linux router answers with (arrived & 0x1E) | 0xC0: 0 says nothing, it may be its own.
  const LOWER = 0x1c;
  return (tos & LOWER) !== 0 && (tos & LOWER) === (outerTos & LOWER);
}

// ─── The climb ──────────────────────────────────────────────────────────────────────────────────

/** Where a path leads. */
export interface ClimbOptions extends Pick<ConnectOptions, "hostname" | "port" | "family"> {
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

/** How a hop has answered so far. */
interface HopStats {
  answers: number;
  silences: number;
  /** When to ask it again, as it probably limits its answers. */
  retryAfter: number;
}

/** A local port and one address of the target: all probes between them take the same path. */
interface Ends {
  readonly family: number;
  /** This end, the port with any address. */
  readonly local: Uint8Array<ArrayBuffer>;
  readonly remote: Uint8Array<ArrayBuffer>;
  readonly address: string;
}

/** Climbs a path, once for each mark; holds the local port and the raw socket meanwhile. */
export class Climb implements Disposable {
  #addresses: string[] = [];
  #ends: Ends | null = null;
  /** Keeps the local port while no probe has it. */
  #anchor: number | null = null;
  #raw: number | null = null;
  #slowest = 0;
  #distance = Infinity;
  readonly #stats = new Map<number, HopStats>();

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
   * @param signal ends the climb
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
      const reply = await this.#ask(ttl, tos, signal);
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
  async askAgain(paths: readonly { tos: number; path: Hop[] }[], signal: AbortSignal) {
    const waiting = new Map<number, { tos: number; path: Hop[] }[]>();
    for (const [ttl, { answers }] of this.#stats) {
      if (answers === 0 || ttl >= this.#distance) continue;
      const silent = paths.filter(({ path }) => path[ttl - 1]?.answer === null);
      if (silent.length > 0) waiting.set(ttl, silent);
    }
    while (waiting.size > 0) {
      await libc.pause(REST, signal);
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
  async #ask(ttl: number, tos: number, signal: AbortSignal): Promise<ProbeResult> {
    const isFirst = !this.#stats.has(ttl);
    if (isFirst) this.#stats.set(ttl, { answers: 0, silences: 0, retryAfter: 0 });
    const stats = this.#stats.get(ttl)!;
    const isRouter = ttl < this.#distance;
    const neverAnswers = stats.answers === 0 && stats.silences > 2;
    const isRateLimited = performance.now() < stats.retryAfter;
    if (isRouter && (neverAnswers || isRateLimited)) {
      return { hop: { ...SILENT, hop: ttl }, conn: null, error: null, started: 0 };
    }
    for (let tries = isFirst || !isRouter ? 2 : 1;; tries--) {
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

  /** Sends one SYN. @param ttl `null` for the default, which reaches the target */
  async #probe(
    ttl: number | null,
    tos: number,
    wait: number,
    signal: AbortSignal,
  ): Promise<ProbeResult> {
    signal.throwIfAborted();
    const { family, local, remote, address } = this.#ends!;
    const fd = libc.orSystemError(libc.socket(family));
    const over = new AbortController(), either = AbortSignal.any([signal, over.signal]);
    let conn: DialedConn | null = null;
    try {
      libc.setOption(fd, libc.SO_REUSEADDR, 1);
      libc.orSystemError(libc.bind(fd, local));
      setProbing(fd, family, true, ttl ?? -1);
      setTos({ fd, family }, tos);
      for (const _old of this.#rawPackets()) { /* about earlier probes */ }
      const started = performance.now();
      const result = libc.connect(fd, remote);
      watch(fd);
      const reply = (hop: Partial<Hop>, error: Error | null = null): ProbeResult => (
        { hop: { ...SILENT, ...hop, hop: ttl }, conn, error, started }
      );
      if (result < 0 && result !== -libc.EINPROGRESS) return reply({}, libc.systemError(-result));
      for (;;) {
        const peer = new Uint8Array(SOCKADDR_SIZE), own = new Uint8Array(SOCKADDR_SIZE);
        if (libc.getpeername(fd, peer) === 0) {
          libc.orSystemError(libc.getsockname(fd, own));
          const milliseconds = this.#time(started, handshakeTime(fd));
          setProbing(fd, family, false, -1);
          // struct linger { int l_onoff; int l_linger; }, socket(7)
          if (this.options.many) libc.setOptionInts(fd, libc.SO_LINGER, new Int32Array([1, 0]));
          conn = new DialedConn({ fd, family, local: own, remote: peer });
          return reply({ address, milliseconds, answer: "connected" });
        }
        for (let message; (message = libc.readErrorQueue(fd)) !== null;) {
          const error = parseIcmpError(message);
          if (error === null) continue;
          const { router, received } = error, answer = icmpMeaning(error);
          const sent = performance.timeOrigin + started;
          const milliseconds = this.#time(started, received === null ? 0 : received - sent);
          const hop = { address: router, milliseconds, answer, ...this.#evidence(error, tos) };
          if (answer === TIME_EXCEEDED && ttl !== null) return reply(hop);
          const loop = answer === TIME_EXCEEDED ? ", as in a routing loop" : "";
          return reply(hop, new Error(`${router} answers: ${answer}${loop}`));
        }
        const errno = libc.getOption(fd, libc.SO_ERROR);
        if (errno === libc.ECONNREFUSED) {
          const milliseconds = this.#time(started);
          const hop = { address, milliseconds, answer: "connection refused" };
          return reply(hop, libc.systemError(errno));
        }
        // An error without its ICMP message shows nothing.
        if (errno !== 0) return reply({}, ttl === null ? libc.systemError(errno) : null);
        const left = wait - (performance.now() - started);
        if (left <= 0) return reply({});
        await Promise.race([nextEvent(fd), libc.pause(left, either)]);
        signal.throwIfAborted();
      }
    } finally {
      over.abort();
      if (conn === null) {
        unwatch(fd);
        libc.close(fd);
      }
    }
  }

  /** Milliseconds from a probe to its answer: the kernel's, if known; ours include compiling. */
  #time(started: number, known = 0): number {
    const elapsed = performance.now() - started;
    const milliseconds = known > 0 && known < elapsed ? known : elapsed;
    this.#slowest = Math.max(this.#slowest, milliseconds);
    return milliseconds;
  }

  /** What an ICMP error shows of the mark. */
  #evidence(error: IcmpError, tos: number): Pick<Hop, "tos" | "outerTos" | "evidence"> {
    if (error.tos !== null) return { tos: error.tos, outerTos: null, evidence: "quote" };
    // The kernel gives the packet to raw sockets before it queues the error.
    for (const packet of this.#rawPackets()) {
      const quote = parseQuote(packet, error, this.#ends!.remote);
      if (quote !== null) return { ...quote, evidence: "quote" };
    }
    const { outerTos } = error;
    const isKept = outerTos !== null && keptLowerBits(tos, outerTos);
    return { tos: null, outerTos, evidence: isKept ? "outer" : null };
  }

  /** What has arrived on the raw socket; each packet is valid until the next. */
  *#rawPackets(): Generator<Uint8Array> {
    if (this.#raw === null) return;
    const packet = new Uint8Array(256);
    for (let size; (size = libc.recv(this.#raw, packet, libc.MSG_DONTWAIT)) >= 0;) {
      yield packet.subarray(0, size);
    }
  }

  /** Takes a local port, and a raw socket, for the next address. @returns false after the last */
  #openNext(): boolean {
    const hostname = this.#addresses.shift();
    if (hostname === undefined) return false;
    const ends = probeEnds(destination(hostname, this.options.port));
    this[Symbol.dispose]();
    this.#stats.clear();
    [this.#slowest, this.#distance] = [0, Infinity];
    this.#anchor = libc.orSystemError(libc.socket(ends.family));
    libc.setOption(this.#anchor, libc.SO_REUSEADDR, 1);
    libc.orSystemError(libc.bind(this.#anchor, ends.local));
    libc.orSystemError(libc.getsockname(this.#anchor, ends.local));
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

const SILENT: Hop = {
  hop: null,
  address: null,
  milliseconds: null,
  tos: null,
  outerTos: null,
  evidence: null,
  answer: null,
};

/** The two ends of all probes; an IPv4-mapped address is an IPv4 one. */
function probeEnds(sockaddr: Uint8Array<ArrayBuffer>): Ends {
  const { at, size } = headerAddress(sockaddr);
  const remote = size === 16 ? sockaddr : new Uint8Array(16);
  if (size === 4) {
    remote.set([AF_INET, 0, sockaddr[2], sockaddr[3], ...sockaddr.subarray(at, at + 4)]);
  }
  const local = new Uint8Array(remote.length);
  local[0] = remote[0];
  return { family: remote[0], local, remote, address: decode(remote).hostname };
}

/** A raw socket for ICMP errors; `null` without CAP_NET_RAW. */
function openRaw(): number | null {
  const fd = libc.socket(AF_INET, libc.SOCK_RAW, libc.IPPROTO_ICMP);
  if (fd < 0) return null;
  const UNREACHABLE = 3, EXCEEDED = 11, PARAMETER = 12;
  // Bits of the types that it does not receive, raw(7).
  libc.setOption(fd, libc.ICMP_FILTER, ~(1 << UNREACHABLE | 1 << EXCEEDED | 1 << PARAMETER));
  return fd;
}

/**
 * Has the kernel queue ICMP errors with what they show and limits how far the SYN goes, or makes an
 * ordinary connection of a probe that came through.
 *
 * @param ttl -1 for the default
 */
function setProbing(fd: number, family: number, isProbe: boolean, ttl: number): void {
  const isIPv4 = family === AF_INET, on = isProbe ? 1 : 0;
  libc.setOption(fd, isIPv4 ? libc.IP_RECVERR : libc.IPV6_RECVERR, on);
  libc.setOption(fd, isIPv4 ? libc.IP_RECVTOS : libc.IPV6_FLOWINFO_SEND, on);
  libc.setOption(fd, libc.SO_TIMESTAMPNS, on);
  libc.setOption(fd, isIPv4 ? libc.IP_TTL : libc.IPV6_UNICAST_HOPS, ttl);
  // Routers that balance load may go by the flow label (RFC 6438), which differs with each socket.
  if (!isIPv4) libc.setOption(fd, libc.IPV6_AUTOFLOWLABEL, 0);
}

/** Milliseconds from a connection's SYN to its SYN-ACK; 0 if the SYN was sent again. */
function handshakeTime(fd: number): number {
  // struct tcp_info: tcpi_rtt in microseconds, include/uapi/linux/tcp.h
  const { buffer } = libc.getOptionBytes(fd, libc.TCP_INFO, 72);
  return new DataView(buffer).getUint32(68, true) / 1000;
}
