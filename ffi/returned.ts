/**
 * The ToS byte with which data arrives on an IPv4 connection, which the kernel reports to nobody: a
 * raw socket receives a copy of each packet, raw(7). Needs CAP_NET_RAW.
 *
 * @module
 */

import type { Socket } from "./fd.ts";
import * as libc from "./libc.ts";
import { AF_INET, headerAddress } from "./sockaddr.ts";

/**
 * Opens a raw socket that receives what arrives from the other end's address at this end's.
 *
 * @returns `null` without CAP_NET_RAW, and on IPv6, which needs none of this
 */
export function openReturned({ local, remote }: Socket): number | null {
  if (headerAddress(local).size !== 4) return null;
  const fd = libc.socket(AF_INET, libc.SOCK_RAW, libc.IPPROTO_TCP);
  if (fd < 0) return null;
  // With both addresses the kernel passes on few packets of others, and with a filter none: those
  // between two busy hosts, or on a busy loopback, would fill the queue.
  filterPorts(fd, local, remote!);
  if (libc.bind(fd, bare(local)) >= 0 && libc.connect(fd, bare(remote!)) >= 0) return fd;
  libc.close(fd);
  return null;
}

/** Has the kernel drop TCP packets for other ports, socket(7); some kernels refuse that. */
function filterPorts(fd: number, local: Uint8Array, remote: Uint8Array): void {
  // struct sock_filter { __u16 code; __u8 jt, jf; __u32 k; }; BPF of
  // include/uapi/linux/bpf_common.h
  const LDX_IP_HEADER = 0xb1, LDH_BEHIND = 0x48, JUMP_IF_EQUAL = 0x15, RETURN = 0x06;
  const port = (end: Uint8Array) => end[2] << 8 | end[3];
  const filter = Uint32Array.from([
    ...[LDX_IP_HEADER, 0],
    ...[LDH_BEHIND, 0],
    ...[JUMP_IF_EQUAL | 3 << 24, port(remote)],
    ...[LDH_BEHIND, 2],
    ...[JUMP_IF_EQUAL | 1 << 24, port(local)],
    ...[RETURN, 128],
    ...[RETURN, 0],
  ]);
  // struct sock_fprog { unsigned short len; struct sock_filter *filter; }
  const program = new BigUint64Array(2);
  program[0] = BigInt(filter.length / 2);
  program[1] = BigInt(Deno.UnsafePointer.value(Deno.UnsafePointer.of(filter)));
  libc.setsockopt(fd, libc.SO_ATTACH_FILTER, new Int32Array(program.buffer));
}

/** The IPv4 address of a `sockaddr`, without the port. */
function bare(sockaddr: Uint8Array): Uint8Array<ArrayBuffer> {
  const { at } = headerAddress(sockaddr), address = new Uint8Array(16);
  address[0] = AF_INET;
  address.set(sockaddr.subarray(at, at + 4), 4);
  return address;
}

// The queue holds as many packets as fit the receive buffer, some hundreds; more are dropped.
const MOST_PACKETS = 1024;

/**
 * The ToS byte of the latest packet with data on that socket, 0 to 255; `null` if there is none.
 */
export function readReturned(fd: number, { local, remote }: Socket): number | null {
  const packet = new Uint8Array(128);
  let tos: number | null = null;
  for (let count = 0; count < MOST_PACKETS; count++) {
    const size = libc.recv(fd, packet, libc.MSG_DONTWAIT);
    if (size < 0) break;
    tos = parseReturned(packet.subarray(0, size), local, remote!) ?? tos;
  }
  return tos;
}

/**
 * The ToS byte of an IPv4 packet, perhaps cut short, if it has data for the connection's port.
 *
 * @param local this end as a `sockaddr`
 * @param remote the other end, likewise
 * @returns `null` if it is another's, or has no data
 */
export function parseReturned(
  packet: Uint8Array,
  local: Uint8Array,
  remote: Uint8Array,
): number | null {
  // RFC 791 section 3.1; RFC 9293 section 3.1
  const tcp = (packet[0] & 0x0f) * 4, length = packet[2] << 8 | packet[3];
  const isOurs = packet[tcp] === remote[2] && packet[tcp + 1] === remote[3] &&
    packet[tcp + 2] === local[2] && packet[tcp + 3] === local[3];
  const data = tcp + (packet[tcp + 12] >> 4) * 4;
  return isOurs && length > data ? packet[1] : null;
}
