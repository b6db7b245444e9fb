/**
 * Structures of the kernel: `sockaddr_in` and `sockaddr_in6` ↔ `Deno.NetAddr`, ip(7), ipv6(7); and
 * control messages, cmsg(3). Pure, no system calls.
 *
 * @module
 */

import type { SocketOption } from "./libc.ts";

/** `AF_INET`, the family of an IPv4 socket; socket(2). */
export const AF_INET = 2;
/** `AF_INET6`, the family of an IPv6 socket; socket(2). */
export const AF_INET6 = 10;

/** Bytes of the larger of the two structures, `sockaddr_in6`. */
export const SOCKADDR_SIZE = 28;

/**
 * 4 or 6 for a literal address without brackets, `null` for a name. Octets are 0 to 255 without
 * leading zeros, which some read as octal (RFC 6943 section 3.1.1): those are for the resolver.
 */
export function familyOf(hostname: string): 4 | 6 | null {
  if (hostname.includes(":")) return 6;
  return ipv4Bytes(hostname) === null ? null : 4;
}

function ipv4Bytes(text: string): number[] | null {
  const octets = text.split(".").map(Number);
  const areOctets = octets.length === 4 && octets.every((octet) => octet >= 0 && octet <= 255);
  return areOctets && octets.join(".") === text ? octets : null;
}

/**
 * The structure for an address and port, as the kernel reads it.
 *
 * @param scope the interface index of a link-local address, `sin6_scope_id`
 * @param sockaddr memory for it, of {@linkcode SOCKADDR_SIZE} bytes
 * @throws {TypeError | RangeError} not an IP address, or not a port
 */
export function encode(
  { hostname, port }: Deno.NetAddr,
  scope = 0,
  sockaddr = new Uint8Array(hostname.includes(":") ? SOCKADDR_SIZE : 16),
): Uint8Array<ArrayBuffer> {
  if (!(port >= 0 && port <= 65535)) throw new RangeError(`${port} is no port; it is 0 to 65535`);
  const isIPv6 = hostname.includes(":");
  sockaddr.fill(0);
  // The family is in the machine's own order, and every machine that Deno runs on is little-endian.
  sockaddr[0] = isIPv6 ? AF_INET6 : AF_INET;
  sockaddr[2] = port >> 8;
  sockaddr[3] = port & 0xff;
  if (isIPv6) {
    sockaddr.set(ipv6Bytes(hostname), 8);
    new DataView(sockaddr.buffer).setUint32(24, scope, true);
  } else {
    const octets = ipv4Bytes(hostname);
    if (octets === null) throw new TypeError(`${JSON.stringify(hostname)} is not an IP address`);
    sockaddr.set(octets, 4);
  }
  return sockaddr;
}

function ipv6Bytes(text: string): number[] {
  // The URL parser reads every way of writing an IPv6 address, and writes it without dots.
  const canonical = URL.parse(`http://[${text.replace(/%.*/, "")}]/`)?.hostname;
  if (canonical === undefined) throw new TypeError(`${JSON.stringify(text)} is not an IP address`);
  const halves = canonical.slice(1, -1).split("::");
  const [head, tail = []] = halves.map((half) => half === "" ? [] : half.split(":"));
  const zeros = halves.length === 1 ? [] : Array(8 - head.length - tail.length).fill("0");
  const groups = [...head, ...zeros, ...tail].map((group) => parseInt(group, 16));
  return groups.flatMap((group) => [group >> 8, group & 0xff]);
}

/** The address and port in a structure, written as Deno writes them. @throws {TypeError} not IP */
export function decode(sockaddr: Uint8Array): Deno.NetAddr {
  const address = addressOf(sockaddr), port = sockaddr[2] << 8 | sockaddr[3];
  if (address.length === 4) {
    const hostname = `${sockaddr[0] === AF_INET ? "" : "::ffff:"}${address.join(".")}`;
    return { transport: "tcp", hostname, port };
  }
  const groups = Array.from({ length: 8 }, (_, i) => address[2 * i] << 8 | address[2 * i + 1]);
  // The URL parser shortens it as RFC 5952 asks.
  const { hostname } = new URL(`http://[${groups.map((group) => group.toString(16)).join(":")}]/`);
  return { transport: "tcp", hostname: hostname.slice(1, -1), port };
}

/**
 * The address in a structure as an IP header has it: 4 bytes for IPv4, IPv4-mapped addresses
 * included, else 16. @throws {TypeError} not IP
 */
export function addressOf(sockaddr: Uint8Array): Uint8Array {
  if (sockaddr[0] === AF_INET) return sockaddr.subarray(4, 8);
  if (sockaddr[0] !== AF_INET6) throw new TypeError(`address family ${sockaddr[0]} is not IP`);
  // ::ffff:0:0/96, RFC 4291 section 2.5.5.2
  let at = 8;
  while (at < 20 && sockaddr[at] === (at < 18 ? 0 : 0xff)) at++;
  return sockaddr.subarray(at === 20 ? 20 : 8, 24);
}

/**
 * Whether two structures have the same address and port. `127.0.0.1` and `::ffff:127.0.0.1` are the
 * same to the kernel, which keeps one table of TCP connections for both.
 */
export function sameEnd(a: Uint8Array, b: Uint8Array): boolean {
  // The port first: it alone distinguishes most sockets.
  const isAlike = a[2] === b[2] && a[3] === b[3] && isIP(a) && isIP(b);
  return isAlike && sameBytes(addressOf(a), addressOf(b));
}

function isIP([family]: Uint8Array): boolean {
  return family === AF_INET || family === AF_INET6;
}

/** Whether two runs of bytes are the same. */
export function sameBytes(a: Uint8Array, b: Uint8Array): boolean {
  for (let at = 0; at < a.length; at++) if (a[at] !== b[at]) return false;
  return a.length === b.length;
}

/** An address and port as people write them: `127.0.0.1:8086`, `[::1]:8086`. */
export function formatAddress({ hostname, port }: Pick<Deno.NetAddr, "hostname" | "port">): string {
  return hostname.includes(":") ? `[${hostname}]:${port}` : `${hostname}:${port}`;
}

/**
 * The value of a control message, cmsg(3): a byte, or an `int` in which only the low byte counts.
 *
 * @param messages control messages in a row, perhaps cut short
 * @param option the level and type of the one that is meant
 * @returns `null` if it is not among them
 */
export function parseControl(messages: Uint8Array, option: SocketOption): number | null {
  return findControl(messages, option)?.[0] ?? null;
}

/** The bytes of a control message, at least one; the parameters of {@linkcode parseControl}. */
export function findControl(messages: Uint8Array, option: SocketOption): Uint8Array | null {
  // struct cmsghdr { size_t cmsg_len; int cmsg_level; int cmsg_type; } of 64-bit machines
  const HEADER = 16;
  const view = new DataView(messages.buffer, messages.byteOffset, messages.length);
  for (let at = 0; at + HEADER < messages.length;) {
    const length = Number(view.getBigUint64(at, true));
    if (length <= HEADER || at + length > messages.length) return null;
    const isIt = view.getInt32(at + 8, true) === option.level &&
      view.getInt32(at + 12, true) === option.option;
    if (isIt) return messages.subarray(at + HEADER, at + length);
    at += Math.ceil(length / 8) * 8;
  }
  return null;
}
