/**
 * ICMP errors about a probe, and what they show of its mark. Pure, no system calls.
 *
 * @module
 */

import * as libc from "./libc.ts";
import { addressOf, AF_INET, AF_INET6, decode, findControl, parseControl } from "./sockaddr.ts";
import { sameBytes, SOCKADDR_SIZE } from "./sockaddr.ts";

/** A message of an error queue: `msg_name`, `msg_control`, data and `msg_flags` of recvmsg(2). */
export interface Message {
  readonly name: Uint8Array;
  readonly control: Uint8Array;
  readonly data: Uint8Array;
  readonly flags: number;
}

/** An ICMP error about a probe, as the socket's error queue has it. */
export interface IcmpError {
  /** 4 for ICMP, 6 for ICMPv6. */
  readonly version: 4 | 6;
  /** The type and code, RFC 792 and RFC 4443. */
  readonly type: number;
  readonly code: number;
  readonly router: string;
  /** The start of the quoted TCP header: ports and sequence number; perhaps less. */
  readonly transport: Uint8Array;
  /** The Traffic Class of the header that the router quotes; `null` on IPv4. */
  readonly tos: number | null;
  /** The ToS byte of the ICMP message itself; `null` on IPv6. */
  readonly icmpTos: number | null;
  /** When it came in, in milliseconds since 1970; `null` if the kernel does not say. */
  readonly received: number | null;
}

/**
 * Reads a message of an error queue: among the control messages `struct sock_extended_err` with the
 * router's address behind it, ip(7); in the name's `sin6_flowinfo` that of the quoted header.
 *
 * @returns `null` if it is no whole ICMP error: nothing is known then
 */
export function parseIcmpError({ name, control, data, flags }: Message): IcmpError | null {
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
    icmpTos: isIPv4 ? parseControl(control, libc.IP_TOS) : null,
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
): { readonly tos: number; readonly icmpTos: number } | null {
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
  if (tcp === null || !sameBytes(packet.subarray(tcp, tcp + 8), error.transport)) return null;
  if (!sameBytes(packet.subarray(quote + 16, quote + 20), addressOf(remote))) return null;
  return { tos: packet[quote + 1], icmpTos: packet[1] };
}

/** The meaning of an ICMP error in words: RFC 792, RFC 1812 section 5.2.7.1, RFC 4443 section 3. */
export function icmpMeaning({ version, type, code }: Pick<IcmpError, "version" | "type" | "code">) {
  const [exceeded, unreachable, codes] = version === 4
    ? [11, 3, UNREACHABLE_4] as const
    : [3, 1, UNREACHABLE_6] as const;
  if (type === exceeded && code === 0) return TIME_EXCEEDED;
  if (type === (version === 4 ? 12 : 4)) return "parameter problem";
  const known = type === unreachable ? codes[code] : undefined;
  return known ?? `ICMP${version === 6 ? "v6" : ""} type ${type} code ${code}`;
}

/** The answer of a router at which the time to live ran out. */
export const TIME_EXCEEDED = "time exceeded";

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
export function keptLowerBits(tos: number, icmpTos: number): boolean {
  // A Linux router answers with (arrived & 0x1E) | 0xC0: without lower bits it may be its own.
  return (tos & 0x1c) !== 0 && icmpTos === (tos & 0x1e | 0xc0);
}
