/**
 * The IP headers of the packets that a connection has sent: proof, without root, of what left this host.
 *
 * With `SO_TIMESTAMPING` and without `SOF_TIMESTAMPING_OPT_TSONLY` the kernel puts a copy of each packet that it
 * hands to the driver into the socket's error queue, after netfilter and with all headers. See
 * Documentation/networking/timestamping.rst in the kernel's sources.
 *
 * @module
 */

import { checkTos } from "./dscp.ts";
import { type Connection, connectionOf, fdOf } from "./fd.ts";
import { IPPROTO_TCP, receiveError, setOption, SO_TIMESTAMPING } from "./libc.ts";
import { markSocket } from "./mark.ts";
import { encode, sameBytes, wireAddress } from "./sockaddr.ts";

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
  watch(fdOf(connection));
}

function watch(fd: number): void {
  const SOF_TIMESTAMPING_TX_SOFTWARE = 1 << 1, SOF_TIMESTAMPING_SOFTWARE = 1 << 4;
  setOption(fd, SO_TIMESTAMPING, SOF_TIMESTAMPING_TX_SOFTWARE | SOF_TIMESTAMPING_SOFTWARE);
}

/**
 * {@linkcode fdOf}, {@linkcode setTos} and {@linkcode watchSent} in one, for who does all three: the socket is looked for
 * once.
 *
 * @returns its descriptor, and the byte read back
 * @throws what these three throw
 */
export function markAndWatch(
  connection: Connection,
  tos: number,
): { fd: number; readBack: number } {
  checkTos(tos);
  const socket = connectionOf(connection);
  const readBack = markSocket(socket, tos);
  watch(socket.fd);
  return { fd: socket.fd, readBack };
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
  const { fd, local, remote } = connectionOf(connection);
  const packets: SentPacket[] = [];
  for (let size; (size = receiveError(fd, copy)) !== null;) {
    const packet = parseLooped(copy, encode(local), encode(remote), size);
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
 * @param length how many bytes of `packet` count
 * @returns `null` where there is no such header: then nothing was observed
 */
export function parseLooped(
  packet: Uint8Array,
  local: Uint8Array,
  remote: Uint8Array,
  length = packet.length,
): SentPacket | null {
  const { size } = wireAddress(local);
  for (let at = 0; at < length; at++) {
    const ports = portsAt(packet, at, size);
    if (ports === null || ports + 4 > length) continue;
    // Source and destination, addresses and ports, stand side by side in both versions.
    const addresses = at + (size === 4 ? 12 : 8);
    const isOurs = isEnd(packet, addresses, ports, local);
    if (isOurs || isEnd(packet, addresses + size, ports + 2, remote)) {
      return headerAt(packet, at, size);
    }
  }
  return null;
}

/** Where the TCP ports are if an IP header is at `at`, with addresses of `size` bytes; `null` where none is. */
function portsAt(packet: Uint8Array, at: number, size: 4 | 16): number | null {
  const isIPv4 = size === 4;
  const version = packet[at] >> 4, protocol = packet[at + (isIPv4 ? 9 : 6)];
  // RFC 791 section 3.1, RFC 8200 section 3; TCP from a plain socket has no extension headers
  const ports = at + (isIPv4 ? (packet[at] & 0x0f) * 4 : 40);
  return version === (isIPv4 ? 4 : 6) && protocol === IPPROTO_TCP && ports >= at + 20
    ? ports
    : null;
}

/** Whether the address and the port at these places are those of `end`. */
function isEnd(packet: Uint8Array, address: number, port: number, end: Uint8Array): boolean {
  const { at, size } = wireAddress(end);
  return sameBytes(packet, port, end, 2, 2) && sameBytes(packet, address, end, at, size);
}

function headerAt(packet: Uint8Array, at: number, size: 4 | 16): SentPacket {
  if (size === 4) return { tos: packet[at + 1], length: packet[at + 2] << 8 | packet[at + 3] };
  const payload = packet[at + 4] << 8 | packet[at + 5];
  return {
    tos: (packet[at] & 0x0f) << 4 | packet[at + 1] >> 4,
    length: payload === 0 ? 0 : 40 + payload,
  };
}
