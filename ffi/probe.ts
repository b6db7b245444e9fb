/**
 * The socket of a probe: its options, what the kernel reports on it, and its ends.
 *
 * @module
 */

import { orDenoError } from "./errors.ts";
import type { Message } from "./icmp.ts";
import * as libc from "./libc.ts";
import { getOptionBytes, setOption } from "./option.ts";
import { AF_INET, decode, headerAddress } from "./sockaddr.ts";

/** A local port and one address of the target: all probes between them take the same path. */
export interface Ends {
  /** `AF_INET` or `AF_INET6`. */
  readonly family: number;
  /** This end, the port with any address. */
  readonly local: Uint8Array<ArrayBuffer>;
  readonly remote: Uint8Array<ArrayBuffer>;
  /** The address of the other end, as text. */
  readonly address: string;
}

/** The two ends of all probes; an IPv4-mapped address is an IPv4 one. */
export function probeEnds(sockaddr: Uint8Array<ArrayBuffer>): Ends {
  const { at, size } = headerAddress(sockaddr);
  const remote = size === 16 ? sockaddr : new Uint8Array(16);
  if (size === 4) {
    remote.set([AF_INET, 0, sockaddr[2], sockaddr[3], ...sockaddr.subarray(at, at + 4)]);
  }
  const local = new Uint8Array(remote.length);
  local[0] = remote[0];
  return { family: remote[0], local, remote, address: decode(remote).hostname };
}

/** A socket that keeps a local port while no probe has it: `ends` is given the port. */
export function openPort({ family, local }: Ends): number {
  const fd = orDenoError(libc.socket(family));
  setOption(fd, libc.SO_REUSEADDR, 1);
  orDenoError(libc.bind(fd, local));
  orDenoError(libc.getsockname(fd, local));
  return fd;
}

/** What has arrived on the raw socket, if there is one; each packet is valid until the next. */
export function* rawPackets(raw: number | null): Generator<Uint8Array> {
  if (raw === null) return;
  const packet = new Uint8Array(256);
  for (let size; (size = libc.recv(raw, packet, libc.MSG_DONTWAIT)) >= 0;) {
    yield packet.subarray(0, size);
  }
}

/** A raw socket for ICMP errors; `null` without CAP_NET_RAW. */
export function openRaw(): number | null {
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
export function setProbing(fd: number, family: number, isProbe: boolean, ttl: number): void {
  const isIPv4 = family === AF_INET, on = isProbe ? 1 : 0;
  setOption(fd, isIPv4 ? libc.IP_RECVERR : libc.IPV6_RECVERR, on);
  setOption(fd, isIPv4 ? libc.IP_RECVTOS : libc.IPV6_FLOWINFO_SEND, on);
  setOption(fd, libc.SO_TIMESTAMPNS, on);
  setOption(fd, isIPv4 ? libc.IP_TTL : libc.IPV6_UNICAST_HOPS, ttl);
  // Routers that balance load may go by the flow label (RFC 6438), which differs with each socket.
  if (!isIPv4) setOption(fd, libc.IPV6_AUTOFLOWLABEL, 0);
}

/** Milliseconds from a connection's SYN to its SYN-ACK; 0 if the SYN was sent again. */
export function handshakeTime(fd: number): number {
  // struct tcp_info: tcpi_rtt in microseconds, include/uapi/linux/tcp.h
  const { buffer } = getOptionBytes(fd, libc.TCP_INFO, 72);
  return new DataView(buffer).getUint32(68, true) / 1000;
}

/** Takes a message off a socket's error queue, recvmsg(2); `null` if none can be had. */
export function readErrorQueue(fd: number): Message | null {
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
