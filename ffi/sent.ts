/**
 * The IP headers of the packets that a connection has sent: proof, without root, of what left this host.
 *
 * With `SO_TIMESTAMPING` and without `SOF_TIMESTAMPING_OPT_TSONLY` the kernel puts a copy of each packet that it
 * hands to the driver into the socket's error queue, after netfilter and with all headers. See
 * Documentation/networking/timestamping.rst in the kernel's sources.
 *
 * @module
 */

import { type Connection, fdOf, socketOf } from "./fd.ts";
import { IPPROTO_TCP, receiveError, setOption, SO_TIMESTAMPING } from "./libc.ts";
import { sameBytes, wireAddress } from "./sockaddr.ts";

/** A packet that left, as its IP header tells. */
export interface SentPacket {
  /** The ToS byte or Traffic Class, 0 to 255; its ECN bits are TCP's own. */
  readonly tos: number;
  /** Bytes of the whole IP packet; 0 where the kernel leaves that to the network card (segments over 64 KiB). */
  readonly length: number;
}

/**
 * Makes the kernel keep a copy of each packet the connection sends from now on: one for each write, of the packet
 * that holds its last byte.
 *
 * Needs no privilege, but sysctl `net.core.tstamp_allow_data` = 1 (the default).
 *
 * @throws {LibcError} the kernel refuses
 * @throws {DescriptorError} the connection is closed
 */
export function watchSent(connection: Connection): void {
  const SOF_TIMESTAMPING_TX_SOFTWARE = 1 << 1, SOF_TIMESTAMPING_SOFTWARE = 1 << 4;
  setOption(fdOf(connection), SO_TIMESTAMPING, SOF_TIMESTAMPING_TX_SOFTWARE | SOF_TIMESTAMPING_SOFTWARE);
}

/**
 * The packets that left since {@linkcode watchSent} or the last call, oldest first. Empty means "not observed", which
 * is neither proof nor disproof: some drivers loop nothing back.
 *
 * Once the first byte of a reply is here, so are the copies of what asked for it.
 *
 * @throws {DescriptorError} the connection is closed
 */
export function takeSent(connection: Connection): SentPacket[] {
  const { fd, local, remote } = socketOf(connection);
  const packets: SentPacket[] = [];
  for (let size; (size = receiveError(fd, copy)) !== null;) {
    const packet = parseLooped(copy.subarray(0, size), local, remote);
    if (packet !== null) packets.push(packet);
  }
  return packets;
}

// Room for a link-layer header and an IP header with options; the kernel cuts off the rest.
const copy = new Uint8Array(128);

/**
 * Finds the IP header in a looped packet, which starts with whatever link-layer header the device has: it is where
 * version, protocol, and an address with its port are the connection's own. One end is enough, as NAT on this host may
 * have changed the other, and an end is not found in the wrong place by chance.
 *
 * @param packet the bytes from the error queue, perhaps cut short
 * @param local this end as a `sockaddr`, in the connection's own family
 * @param remote the other end, likewise
 * @returns `null` where there is no such header: then nothing was observed
 */
export function parseLooped(packet: Uint8Array, local: Uint8Array, remote: Uint8Array): SentPacket | null {
  const source = wireAddress(local), destination = wireAddress(remote);
  const parse = source.length === 4 ? parseIPv4 : parseIPv6;
  for (let at = 0; at < packet.length; at++) {
    const header = parse(packet.subarray(at));
    if (header === null) continue;
    const isOurs = sameBytes(header.source, source) && sameBytes(header.ports.subarray(0, 2), local.subarray(2, 4));
    const isTheirs = sameBytes(header.destination, destination) &&
      sameBytes(header.ports.subarray(2), remote.subarray(2, 4));
    if (isOurs || isTheirs) return { tos: header.tos, length: header.length };
  }
  return null;
}

interface Header extends SentPacket {
  readonly source: Uint8Array;
  readonly destination: Uint8Array;
  /** Source and destination port, two bytes each. */
  readonly ports: Uint8Array;
}

/** RFC 791 section 3.1 */
function parseIPv4(bytes: Uint8Array): Header | null {
  const size = (bytes[0] & 0x0f) * 4;
  if (bytes[0] >> 4 !== 4 || size < 20 || bytes.length < size + 4 || bytes[9] !== IPPROTO_TCP) return null;
  return {
    tos: bytes[1],
    length: bytes[2] << 8 | bytes[3],
    source: bytes.subarray(12, 16),
    destination: bytes.subarray(16, 20),
    ports: bytes.subarray(size, size + 4),
  };
}

/** RFC 8200 section 3; TCP from a plain socket has no extension headers */
function parseIPv6(bytes: Uint8Array): Header | null {
  const size = 40;
  if (bytes[0] >> 4 !== 6 || bytes.length < size + 4 || bytes[6] !== IPPROTO_TCP) return null;
  const payload = bytes[4] << 8 | bytes[5];
  return {
    tos: (bytes[0] & 0x0f) << 4 | bytes[1] >> 4,
    length: payload === 0 ? 0 : size + payload,
    source: bytes.subarray(8, 24),
    destination: bytes.subarray(24, 40),
    ports: bytes.subarray(size, size + 4),
  };
}
