/**
 * A SYN whose time to live may run out, and its answer: the socket's options, its ends, what the
 * kernel reports on it, and what that shows of the mark.
 *
 * @module
 */
import { connectedAt, type DialedConn, startConnect } from "./dial.ts";
import { denoError, getOption, getOptionBytes, orDenoError, orLibcError } from "./calls.ts";
import { setOption } from "./calls.ts";
import { type IcmpError, icmpMeaning, keptLowerBits, type Message } from "./icmp.ts";
import { parseIcmpError, parseQuote, TIME_EXCEEDED } from "./icmp.ts";
import * as libc from "./libc.ts";
import { setTosAt } from "./mark.ts";
import { nextEvent, unwatch, watch } from "./poll.ts";
import { addressOf, AF_INET, decode, encode } from "./sockaddr.ts";
import { pause } from "./deno.ts";

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
  /** Milliseconds of waiting in vain; `null` if it answered. */
  readonly waited: number | null;
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
  /** Whether it had another local port than the rest of the path. */
  readonly isFreshPort: boolean;
}

/** Any address and port of this host. */
export function anyEnd(family: number): Uint8Array<ArrayBuffer> {
  return encode({ transport: "tcp", hostname: family === AF_INET ? "0.0.0.0" : "::", port: 0 });
}

/** A socket that keeps a port while no probe has it. @param local is given the port */
export function openPort(local: Uint8Array<ArrayBuffer>): number {
  const fd = orDenoError(libc.socket(local[0]));
  setOption(fd, libc.SO_REUSEADDR, 1);
  orDenoError(libc.bind(fd, local));
  orDenoError(libc.getsockname(fd, local));
  return fd;
}

/** What has arrived on the raw socket, if there is one; each packet is valid until the next. */
function* rawPackets(raw: number | null): Generator<Uint8Array> {
  if (raw === null) return;
  const packet = new Uint8Array(256);
  for (let size; (size = libc.recv(raw, packet, libc.MSG_DONTWAIT)) >= 0;) {
    yield packet.subarray(0, size);
  }
}

/** A raw socket for ICMP errors; `null` without CAP_NET_RAW. */
function openRaw(): number | null {
  const fd = libc.socket(AF_INET, libc.SOCK_RAW, libc.IPPROTO_ICMP);
  if (fd < 0) return null;
  const UNREACHABLE = 3, EXCEEDED = 11, PARAMETER = 12;
  // Bits of the types that it does not receive, raw(7).
  setOption(fd, libc.ICMP_FILTER, ~(1 << UNREACHABLE | 1 << EXCEEDED | 1 << PARAMETER));
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
  setOption(fd, isIPv4 ? libc.IP_RECVERR : libc.IPV6_RECVERR, on);
  setOption(fd, isIPv4 ? libc.IP_RECVTOS : libc.IPV6_FLOWINFO_SEND, on);
  setOption(fd, libc.SO_TIMESTAMPNS, on);
  setOption(fd, isIPv4 ? libc.IP_TTL : libc.IPV6_UNICAST_HOPS, ttl);
  // Routers that balance load may go by the flow label (RFC 6438), which differs with each socket.
  if (!isIPv4) setOption(fd, libc.IPV6_AUTOFLOWLABEL, 0);
}

/**
 * Whether closing a socket resets its connection: its ends are then free at once, also if a SYN-ACK
 * has come just before.
 */
export function setResetOnClose(fd: number, isOn: boolean): void {
  // struct linger { int l_onoff; int l_linger; }, socket(7)
  const linger = Int32Array.of(isOn ? 1 : 0, 0);
  orLibcError("setsockopt(SO_LINGER)", libc.setsockopt(fd, libc.SO_LINGER, linger));
}

/** Milliseconds from a connection's SYN to its SYN-ACK; 0 if the SYN was sent again. */
function handshakeTime(fd: number): number {
  // struct tcp_info: tcpi_rtt in microseconds, include/uapi/linux/tcp.h
  const { buffer, length } = getOptionBytes(fd, libc.TCP_INFO);
  return length < 72 ? 0 : new DataView(buffer).getUint32(68, true) / 1000;
}

/** Takes a message off a socket's error queue, recvmsg(2); `null` if none can be had. */
function readErrorQueue(fd: number): Message | null {
  // A struct msghdr and what it points to, in one block: no part can be freed before the rest.
  const IOVEC = 56, NAME = 72, CONTROL = 104, DATA = 616, SIZE = 1280;
  const words = new BigUint64Array(SIZE / 8), block = new Uint8Array(words.buffer);
  const start = Deno.UnsafePointer.value(Deno.UnsafePointer.of(block));
  const pointerTo = (offset: number) => start + BigInt(offset);
  words.set([
    pointerTo(NAME), // msg_name
    BigInt(CONTROL - NAME), // msg_namelen
    pointerTo(IOVEC), // msg_iov
    1n, // msg_iovlen
    pointerTo(CONTROL), // msg_control
    BigInt(DATA - CONTROL), // msg_controllen
    0n, // msg_flags
    pointerTo(DATA), // iov_base
    BigInt(SIZE - DATA), // iov_len
  ]);
  const size = libc.recvmsg(fd, block, libc.MSG_ERRQUEUE | libc.MSG_DONTWAIT);
  if (size < 0) return null;
  return {
    name: block.subarray(NAME, NAME + Number(words[1])),
    control: block.subarray(CONTROL, CONTROL + Number(words[5])),
    data: block.subarray(DATA, DATA + size),
    flags: Number(words[6]),
  };
}

/** The answer of a target that refuses, or of a firewall in its place. */
export const REFUSED = "connection refused";

const NOTHING = { address: null, milliseconds: null, tos: null, icmpTos: null, waited: null };
const SILENT: Hop = { ...NOTHING, hop: null, evidence: null, answer: null };

/** The result of a probe that did not connect. */
export function resultOf(
  { ttl, started, isFreshPort = false }: Pick<Probe, "ttl" | "started"> & Partial<Probe>,
  hop: Partial<Hop>,
  error: Error | null = null,
): ProbeResult {
  return { hop: { ...SILENT, ...hop, hop: ttl }, conn: null, error, started, isFreshPort };
}

/** A SYN that waits for its answer. */
interface Probe extends Pick<ProbeResult, "started" | "isFreshPort"> {
  readonly fd: number;
  /** `null` for the default, which reaches the target. */
  readonly ttl: number | null;
  readonly tos: number;
}

/**
 * Sends probes from one local port to one address, between which all take the same path; holds the
 * port and the raw socket meanwhile.
 */
export class Prober implements Disposable {
  /** The slowest answer so far, in milliseconds. */
  slowest = 0;
  readonly #family: number;
  readonly #local: Uint8Array<ArrayBuffer>;
  readonly #remote: Uint8Array<ArrayBuffer>;
  /** Keeps the local port while no probe has it. */
  readonly #anchor: number;
  readonly #raw: number | null;

  /** Takes a port. @param to the target as a `sockaddr` */
  constructor(to: Uint8Array<ArrayBuffer>) {
    const address = addressOf(to), isIPv4 = address.length === 4;
    // An IPv4-mapped address is an IPv4 one.
    this.#remote = isIPv4 ? encode({ ...decode(to), hostname: address.join(".") }) : to;
    this.#family = this.#remote[0];
    this.#local = anyEnd(this.#family);
    this.#anchor = openPort(this.#local);
    this.#raw = isIPv4 ? openRaw() : null;
  }

  /** Whether routers on this path can show the whole mark: on IPv4 this takes CAP_NET_RAW. */
  get isExact(): boolean {
    return this.#raw !== null || this.#family !== AF_INET;
  }

  /**
   * Sends one SYN and waits for its answer.
   *
   * @param ttl `null` for the default
   * @param isFreshPort from a port that the kernel chooses, which may take another path
   */
  async probe(
    ttl: number | null,
    tos: number,
    wait: number,
    signal: AbortSignal,
    isFreshPort = false,
  ): Promise<ProbeResult> {
    signal.throwIfAborted();
    const family = this.#family, fd = orDenoError(libc.socket(family));
    let reply: ProbeResult | null = null;
    try {
      setOption(fd, libc.SO_REUSEADDR, 1);
      orDenoError(libc.bind(fd, isFreshPort ? anyEnd(family) : this.#local));
      setProbing(fd, family, true, ttl ?? -1);
      setResetOnClose(fd, true);
      setTosAt(fd, family, tos);
      for (const _old of rawPackets(this.#raw)) { /* about earlier probes */ }
      const probe = { fd, ttl, tos, isFreshPort, started: performance.now() };
      const result = startConnect(fd, this.#remote);
      watch(fd);
      if (result !== -libc.EINPROGRESS) return resultOf(probe, {}, denoError(-result));
      while ((reply = this.#connected(probe) ?? this.#refused(probe)) === null) {
        const rest = wait - (performance.now() - probe.started);
        if (rest <= 0) return resultOf(probe, { waited: wait });
        const over = new AbortController(), either = AbortSignal.any([signal, over.signal]);
        await Promise.race([nextEvent(fd), pause(rest, either)]);
        over.abort();
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

  /** The connection, if the probe came through; else `null`. */
  #connected(probe: Probe): ProbeResult | null {
    const { fd, started } = probe, conn = connectedAt(fd);
    if (conn === null) return null;
    const address = conn.remoteAddr.hostname;
    const milliseconds = this.#time(started, handshakeTime(fd));
    setProbing(fd, this.#family, false, -1);
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
      const address = decode(this.#remote).hostname, milliseconds = this.#time(started);
      return resultOf(probe, { address, milliseconds, answer: REFUSED }, denoError(errno));
    }
    // An error without its ICMP message shows nothing.
    return resultOf(probe, {}, ttl === null ? denoError(errno) : null);
  }

  /** Milliseconds from a probe to its answer: the kernel's, if known; ours include compiling. */
  #time(started: number, known = 0): number {
    const elapsed = performance.now() - started;
    const milliseconds = known > 0 && known < elapsed ? known : elapsed;
    this.slowest = Math.max(this.slowest, milliseconds);
    return milliseconds;
  }

  /** What an ICMP error shows of the mark. */
  #evidence(error: IcmpError, tos: number): Pick<Hop, "tos" | "icmpTos" | "evidence"> {
    if (error.tos !== null) return { tos: error.tos, icmpTos: null, evidence: "quote" };
    // The kernel gives the packet to raw sockets before it queues the error.
    for (const packet of rawPackets(this.#raw)) {
      const quote = parseQuote(packet, error, this.#remote);
      if (quote !== null) return { ...quote, evidence: "quote" };
    }
    const { icmpTos } = error;
    const isKept = icmpTos !== null && keptLowerBits(tos, icmpTos);
    return { tos: null, icmpTos, evidence: isKept ? "icmp" : null };
  }

  /** Gives the local port back. Connections stay. */
  [Symbol.dispose](): void {
    libc.close(this.#anchor);
    if (this.#raw !== null) libc.close(this.#raw);
  }
}
