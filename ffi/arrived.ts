/**
 * The bytes with which packets reached a socket: the SYN, the ACK that ended the handshake, and the
 * latest packet.
 *
 * Needs no privilege. The kernel keeps the SYN's headers if asked to (`TCP_SAVE_SYN`). On IPv4 it
 * reports the ToS byte of the handshake's ACK (ip(7), `IP_PKTOPTIONS`) and nothing about later
 * packets, on IPv6 the Traffic Class of the latest packet (RFC 2292 section 13).
 *
 * @module
 */

import { type Connection, type Listening, type Socket, socketOf } from "./fd.ts";
import * as libc from "./libc.ts";
import { getOptionBytes, setOption } from "./option.ts";
import { AF_INET6, headerAddress } from "./sockaddr.ts";

/** The bytes that arrived, 0 to 255 each; `null` for what the kernel does not report. */
export interface Arrived {
  /** The ToS byte or Traffic Class of the SYN. */
  readonly syn: number | null;
  /** The ToS byte of the ACK that ended the handshake; on IPv4 only. */
  readonly ack: number | null;
  /** The Traffic Class of the latest packet; on IPv6 only. */
  readonly data: number | null;
}

/**
 * Makes a listener keep what {@linkcode readArrived} reports of the connections that it accepts.
 * Call it before clients connect.
 *
 * @throws {LibcError} the kernel refuses
 * @throws {DescriptorError} the listener is closed
 */
export function keepArrivals(listener: Listening): void {
  const socket = socketOf(listener);
  setOption(socket.fd, libc.TCP_SAVE_SYN, 1);
  setOption(socket.fd, libc.IP_RECVTOS, 1);
  watchClass(socket);
}

/**
 * Makes the kernel report the Traffic Class of what an IPv6 connection receives from now on, as
 * `data` of {@linkcode readArrived}; on IPv4 it does nothing.
 *
 * @throws {LibcError} the kernel refuses
 * @throws {DescriptorError} the connection is closed
 */
export function watchArriving(connection: Connection): void {
  watchClass(socketOf(connection));
}

function watchClass({ fd, family }: Socket): void {
  if (family === AF_INET6) setOption(fd, libc.IPV6_RECVTCLASS, 1);
}

/**
 * What has arrived on a connection that was accepted after {@linkcode keepArrivals}, or that
 * {@linkcode watchArriving} watches.
 *
 * @throws {DescriptorError} the connection is closed
 */
export function readArrived(connection: Connection): Arrived {
  const socket = socketOf(connection);
  // The kernel hands the SYN out once, then forgets it.
  if (socket.syn === undefined) {
    socket.syn = parseSyn(getOptionBytes(socket.fd, libc.TCP_SAVED_SYN, 256));
  }
  return { syn: socket.syn, ack: handshakeAck(socket), data: latestClass(socket) };
}

/** The ToS byte of the ACK that ended the handshake; `null` on IPv6. */
function handshakeAck({ fd, local }: Socket): number | null {
  // An IPv4-mapped connection reports what an IPv4 one does.
  if (headerAddress(local).size !== 4) return null;
  return parseControl(getOptionBytes(fd, libc.IP_PKTOPTIONS, 256), libc.IP_TOS);
}

/** The Traffic Class of the latest packet; `null` on IPv4. */
export function latestClass({ fd, local }: Socket): number | null {
  if (headerAddress(local).size === 4) return null;
  return parseControl(getOptionBytes(fd, libc.IPV6_2292PKTOPTIONS, 256), libc.IPV6_TCLASS);
}

/**
 * The ToS byte (RFC 791 section 3.1) or Traffic Class (RFC 8200 section 3) of a saved SYN, which
 * starts with its IP header.
 *
 * @returns `null` if there is no whole IP header
 */
export function parseSyn(headers: Uint8Array): number | null {
  const version = headers[0] >> 4;
  if (version === 4 && headers.length >= 20) return headers[1];
  if (version === 6 && headers.length >= 40) return (headers[0] & 0x0f) << 4 | headers[1] >> 4;
  return null;
}

/**
 * The value of a control message, cmsg(3): a byte, or an `int` in which only the low byte counts.
 *
 * @param messages control messages in a row, perhaps cut short
 * @param option the level and type of the one that is meant
 * @returns `null` if it is not among them
 */
export function parseControl(messages: Uint8Array, option: libc.SocketOption): number | null {
  return findControl(messages, option)?.[0] ?? null;
}

/** The bytes of a control message, at least one; the parameters of {@linkcode parseControl}. */
export function findControl(messages: Uint8Array, option: libc.SocketOption): Uint8Array | null {
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
