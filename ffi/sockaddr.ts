/**
 * `struct sockaddr_in` and `sockaddr_in6` ↔ `Deno.NetAddr`; ip(7), ipv6(7).
 *
 * @module
 */

/** `AF_INET`, the family of an IPv4 socket; socket(2). */
export const AF_INET = 2;
/** `AF_INET6`, the family of an IPv6 socket; socket(2). */
export const AF_INET6 = 10;

/** Bytes of the larger of the two structures, `sockaddr_in6`. */
export const SOCKADDR_SIZE = 28;

const MAPPED_PREFIX = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

const IPV4 = /^(\d+)\.(\d+)\.(\d+)\.(\d+)$/;

/** 4 or 6 for a literal address without brackets, `null` for a name. */
export function familyOf(hostname: string): 4 | 6 | null {
  if (hostname.includes(":")) return 6;
  return IPV4.test(hostname) ? 4 : null;
}

/**
 * The 4 or 16 bytes of a literal address, in network order; a scope (`%eth0`) is ignored.
 *
 * @throws {TypeError} the text is not an IP address
 */
export function addressBytes(text: string): Uint8Array<ArrayBuffer> {
  const ipv4 = IPV4.exec(text);
  if (ipv4 !== null) return new Uint8Array([+ipv4[1], +ipv4[2], +ipv4[3], +ipv4[4]]);
  // The URL parser knows every way of writing an IPv6 address and gives the shortest, without dots.
  const canonical = URL.parse(`http://[${text.replace(/%.*/, "")}]/`)?.hostname;
  if (canonical === undefined) throw new TypeError(`${JSON.stringify(text)} is not an IP address`);
  const [head, tail] = canonical.slice(1, -1).split("::").map((half) => half === "" ? [] : half.split(":"));
  const zeros = tail === undefined ? [] : Array(8 - head.length - tail.length).fill("0");
  const groups = [...head, ...zeros, ...(tail ?? [])].map((group) => parseInt(group, 16));
  return Uint8Array.from(groups.flatMap((group) => [group >> 8, group & 0xff]));
}

/** The structure for an address and port, as the kernel wants it. @throws {TypeError} not an IP address */
export function encode(address: Deno.NetAddr): Uint8Array<ArrayBuffer> {
  const bytes = addressBytes(address.hostname);
  const sockaddr = new Uint8Array(bytes.length === 4 ? 16 : SOCKADDR_SIZE);
  // The family is in the machine's own order, and every machine that Deno runs on is little-endian.
  sockaddr[0] = bytes.length === 4 ? AF_INET : AF_INET6;
  sockaddr[2] = address.port >> 8;
  sockaddr[3] = address.port & 0xff;
  sockaddr.set(bytes, bytes.length === 4 ? 4 : 8);
  return sockaddr;
}

/** The address and port in a structure, written as Deno writes them. @throws {TypeError} not IP */
export function decode(sockaddr: Uint8Array): Deno.NetAddr {
  const port = sockaddr[2] << 8 | sockaddr[3];
  const v4 = (bytes: Uint8Array) => bytes.join(".");
  const address = wireAddress(sockaddr);
  if (sockaddr[0] === AF_INET) return { transport: "tcp", hostname: v4(address), port };
  if (address.length === 4) return { transport: "tcp", hostname: `::ffff:${v4(address)}`, port };
  const groups = Array.from({ length: 8 }, (_, at) => (address[2 * at] << 8 | address[2 * at + 1]).toString(16));
  // The URL parser shortens it as RFC 5952 asks.
  return { transport: "tcp", hostname: new URL(`http://[${groups.join(":")}]/`).hostname.slice(1, -1), port };
}

/**
 * Whether two structures name the same end. `127.0.0.1` and `::ffff:127.0.0.1` are the same to the kernel, which keeps
 * one table of TCP connections for both.
 */
export function sameEnd(a: Uint8Array, b: Uint8Array): boolean {
  // The port first: it alone tells most sockets apart.
  if (a[2] !== b[2] || a[3] !== b[3]) return false;
  const x = unmapped(a), y = unmapped(b);
  return x !== null && y !== null && sameBytes(x, y);
}

/** Whether two runs of bytes are the same. */
export function sameBytes(a: Uint8Array, b: Uint8Array): boolean {
  if (a.length !== b.length) return false;
  for (let at = 0; at < a.length; at++) if (a[at] !== b[at]) return false;
  return true;
}

/** The address's bytes, 4 of them for an IPv4-mapped one; `null` for a family that is not IP. */
function unmapped(sockaddr: Uint8Array): Uint8Array | null {
  if (sockaddr[0] === AF_INET) return sockaddr.subarray(4, 8);
  if (sockaddr[0] !== AF_INET6) return null;
  const mapped = MAPPED_PREFIX.every((byte, i) => sockaddr[8 + i] === byte);
  return sockaddr.subarray(mapped ? 20 : 8, 24);
}

/** `sockaddr` read as an IP header names it: 4 bytes for IPv4, also where the socket is IPv4-mapped, else 16. */
export function wireAddress(sockaddr: Uint8Array): Uint8Array {
  const address = unmapped(sockaddr);
  if (address === null) throw new TypeError(`address family ${sockaddr[0]} is not IP`);
  return address;
}

/** An address and port in a form for people: `127.0.0.1:8086`, `[::1]:8086`. */
export function endText(end: Deno.NetAddr): string {
  return end.hostname.includes(":") ? `[${end.hostname}]:${end.port}` : `${end.hostname}:${end.port}`;
}
