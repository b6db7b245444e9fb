/**
 * The IP headers of the packets that a connection has sent: proof, without root, of what left this
 * host.
 *
 * With `SO_TIMESTAMPING` and without `SOF_TIMESTAMPING_OPT_TSONLY` the kernel puts a copy of each
 * packet that it hands to the driver on the socket's error queue, after netfilter and with all
 * headers: Documentation/networking/timestamping.rst in the kernel's sources.
 *
 * @module
 */

import { type Connection, type Socket, socketOf } from "./fd.ts";
import * as libc from "./libc.ts";
import { setOption } from "./calls.ts";
import { addressOf, AF_INET, AF_INET6, sameBytes, SOCKADDR_SIZE } from "./sockaddr.ts";

/** A packet that left, as its IP header shows. */
export interface SentPacket {
  /** The ToS byte or Traffic Class, 0 to 255; its ECN bits are TCP's own. */
  readonly tos: number;
  /** Bytes of the IP packet; 0 if the kernel leaves that to the network card (over 64 KiB). */
  readonly length: number;
  /** Bytes of data that it carries; 0 if `length` is. */
  readonly payload: number;
  /** Its TCP sequence number (RFC 9293 section 3.1): a retransmission has the same one again. */
  readonly sequence: number;
  /** Whether it left inside another packet, as in a tunnel: then that one's byte counts. */
  readonly isWrapped: boolean;
  /** The byte of the outer IP header; `null` if there is none, or it cannot be read. */
  readonly outerTos: number | null;
  /** Bytes in front of the outermost IP header; 0 on a tunnel device, which takes none. */
  readonly linkHeader: number;
  /** Whether a rule on this host kept it here, as for a proxy beside the program. */
  readonly isRedirected: boolean;
}

/**
 * Makes the kernel keep copies of the packets that the connection sends from now on: one for each
 * write, of the packet that holds the write's last byte. SYN, FIN and bare ACKs are not copied.
 *
 * Needs no privilege, but sysctl `net.core.tstamp_allow_data` = 1 (the default).
 *
 * @throws {LibcError} the kernel refuses
 * @throws {DescriptorError} the connection is closed
 */
export function watchSent(connection: Connection): void {
  watchSentAt(socketOf(connection));
}

/** {@linkcode watchSent} of a socket. */
export function watchSentAt({ fd }: Socket): void {
  const SOF_TIMESTAMPING_TX_SOFTWARE = 1 << 1, SOF_TIMESTAMPING_SOFTWARE = 1 << 4;
  const flags = SOF_TIMESTAMPING_TX_SOFTWARE | SOF_TIMESTAMPING_SOFTWARE;
  setOption(fd, libc.SO_TIMESTAMPING, flags);
}

/**
 * The packets that left since {@linkcode watchSent} or the last call, oldest first. None means "not
 * observed", which neither proves nor disproves anything: some drivers loop nothing back.
 *
 * By the first byte of a reply, the copies of the request's packets are there.
 *
 * @throws {DescriptorError} the connection is closed
 */
export function drainSent(connection: Connection): SentPacket[] {
  return drainSentAt(socketOf(connection));
}

/** {@linkcode drainSent} of a socket. */
export function drainSentAt({ fd, local, remote }: Socket): SentPacket[] {
  const packets: SentPacket[] = [];
  for (;;) {
    const size = libc.recv(fd, copy, libc.MSG_ERRQUEUE | libc.MSG_DONTWAIT);
    if (size < 0) return packets;
    const packet = parseLooped(copy.subarray(0, size), local, remote!);
    if (packet !== null) packets.push(packet);
  }
}

// Room for the headers of a packet inside an SRv6 tunnel over 24 segments, RFC 8754; the kernel
// cuts off the rest.
const copy = new Uint8Array(512);

/**
 * Bytes of data that a TCP connection has sent or is about to send, each counted once, by its
 * `struct tcp_info`; `null` if that is cut short, as before Linux 4.19.
 */
export function parseDataSent(info: Uint8Array): number | null {
  // tcpi_notsent_bytes, tcpi_bytes_sent, tcpi_bytes_retrans; include/uapi/linux/tcp.h
  if (info.length < 216) return null;
  const view = new DataView(info.buffer, info.byteOffset), waiting = view.getUint32(144, true);
  return waiting + Number(view.getBigUint64(200, true) - view.getBigUint64(208, true));
}

/**
 * Finds the connection's IP header in a looped packet, behind the link-layer header of its device
 * and perhaps the headers of a tunnel: where version, protocol, and an address with its port are
 * the connection's own. One end is enough, as NAT on this host may have changed the other.
 *
 * @param packet perhaps cut short
 * @param isHere whether an address is one of this host's
 * @returns `null` if there is no such header: then nothing was observed
 */
export function parseLooped(
  packet: Uint8Array,
  local: Uint8Array,
  remote: Uint8Array,
  isHere: (sockaddr: Uint8Array) => boolean = isHostAddress,
): SentPacket | null {
  const ours = addressOf(local), theirs = addressOf(remote);
  const size = ours.length, isIPv4 = size === 4;
  const has = (at: number, bytes: Uint8Array) =>
    sameBytes(packet.subarray(at, at + bytes.length), bytes);
  for (let at = 0; at < packet.length; at++) {
    // RFC 791 section 3.1, RFC 8200 section 3; TCP from a plain socket has no extension headers
    if (packet[at] >> 4 !== (isIPv4 ? 4 : 6)) continue;
    if (packet[at + (isIPv4 ? 9 : 6)] !== libc.IPPROTO_TCP) continue;
    const tcp = at + (isIPv4 ? (packet[at] & 0x0f) * 4 : 40);
    // Byte 12 of TCP's header, the last that is needed, says where data begins.
    if (tcp < at + 20 || tcp + 13 > packet.length) continue;
    // Source and destination, addresses and ports, stand side by side in both versions.
    const source = at + (isIPv4 ? 12 : 8);
    const isFromUs = has(tcp, local.subarray(2, 4)) && has(source, ours);
    const isToThem = has(tcp + 2, remote.subarray(2, 4)) && has(source + size, theirs);
    if (!isFromUs && !isToThem) continue;
    // The two MAC addresses of `lo` are zero, whichever rule sent the packet there.
    const isOnLoopback = packet.subarray(0, 12).every((byte) => byte === 0);
    return { ...packetAt(packet, at, tcp), isRedirected: isOnLoopback && !isHere(remote) };
  }
  return null;
}

function packetAt(packet: Uint8Array, at: number, tcp: number): Omit<SentPacket, "isRedirected"> {
  const isIPv4 = packet[at] >> 4 === 4, outer = outermostHeader(packet, at);
  // IPv6's does not count its own header.
  const said = wordAt(packet, at + (isIPv4 ? 2 : 4));
  const length = isIPv4 || said === 0 ? said : 40 + said;
  // RFC 9293 section 3.1: the upper half of byte 12 is the header's length in words.
  const headers = tcp - at + (packet[tcp + 12] >> 4) * 4;
  return {
    tos: byteAt(packet, at),
    length,
    payload: Math.max(0, length - headers),
    sequence: (wordAt(packet, tcp + 4) << 16 | wordAt(packet, tcp + 6)) >>> 0,
    isWrapped: outer !== at,
    outerTos: outer === at || outer === null ? null : byteAt(packet, outer),
    linkHeader: outer ?? at,
  };
}

// EtherTypes of IPv4 and IPv6, RFC 9542 appendix B; PPP's numbers, RFC 1332 and RFC 5072
const IP_TYPES = [0x0800, 0x86dd, 0x0021, 0x0057];

/**
 * Where the outermost IP header is: right behind the link header, whatever its packet's length and
 * whatever it carries. If anything else is there, the packet is wrapped in something unknown.
 *
 * @param own where the connection's own header is
 * @returns `null` if something is in front of the own header that is not IP
 */
function outermostHeader(packet: Uint8Array, own: number): number | null {
  const VLAN = [0x8100, 0x88a8], PPPOE = 0x8864; // IEEE 802.1Q, RFC 2516
  const saysIP = (at: number) => IP_TYPES.includes(wordAt(packet, at - 2));
  // Ethernet, with its tags
  let at = 14;
  while (VLAN.includes(wordAt(packet, at - 2))) at += 4;
  if (wordAt(packet, at - 2) === PPPOE) at += 8;
  if (saysIP(at) && (at === own || isHeader(packet, at, own))) return at;
  // A device without a link header, such as tun.
  if (isHeader(packet, 0, own)) return 0;
  // The link header of PPP or IPoIB (RFC 4391), or one with a switch's tag: with no room for an
  // outer IP header behind two MAC addresses and a type.
  return own <= 4 || (own < 14 + 20 && saysIP(own)) ? own : null;
}

/** Whether a whole IP header may be at `at`, in front of `end`. */
function isHeader(packet: Uint8Array, at: number, end: number): boolean {
  if (packet[at] >> 4 === 6) return at + 40 <= end;
  return packet[at] >> 4 === 4 && (packet[at] & 0x0f) >= 5 && at + 20 <= end;
}

/** Two bytes in network order; 0 if the packet was cut before them. */
function wordAt(packet: Uint8Array, at: number): number {
  return at + 2 <= packet.length ? packet[at] << 8 | packet[at + 1] : 0;
}

/** The ToS byte or Traffic Class of the IP header at `at`. */
function byteAt(packet: Uint8Array, at: number): number {
  if (packet[at] >> 4 === 4) return packet[at + 1];
  return (packet[at] & 0x0f) << 4 | packet[at + 1] >> 4;
}

// ─── Addresses of this host, getifaddrs(3) ──────────────────────────────────────────────────────

/** Whether an address, as a `sockaddr`, is one of this host's; its port does not count. */
export function isHostAddress(sockaddr: Uint8Array): boolean {
  const address = addressOf(sockaddr);
  // All of 127.0.0.0/8, of which the interface has one.
  return (address.length === 4 && address[0] === 127) || interfaceWith(sockaddr) !== null;
}

/** The name of the interface that has an address; `null` if none has, or if it is unknown. */
export function interfaceWith(sockaddr: Uint8Array): string | null {
  const wanted = addressOf(sockaddr), first = new BigUint64Array(1);
  if (libc.getifaddrs(first) < 0) return null;
  const list = Deno.UnsafePointer.create(first[0]);
  let found: string | null = null;
  for (let entry = list; entry !== null;) {
    // struct ifaddrs { struct ifaddrs *ifa_next; char *ifa_name; unsigned ifa_flags;
    //   struct sockaddr *ifa_addr; … }
    const view = new Deno.UnsafePointerView(entry), address = view.getPointer(24);
    const family = address === null ? 0 : new Deno.UnsafePointerView(address).getUint16();
    if (family === AF_INET || family === AF_INET6) {
      const theirs = new Uint8Array(family === AF_INET ? 16 : SOCKADDR_SIZE);
      Deno.UnsafePointerView.copyInto(address!, theirs);
      if (sameBytes(addressOf(theirs), wanted)) {
        found = Deno.UnsafePointerView.getCString(view.getPointer(8)!);
      }
    }
    entry = view.getPointer(0);
  }
  libc.freeifaddrs(list);
  return found;
}
