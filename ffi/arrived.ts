/**
 * The bytes with which packets reached a socket: the SYN, and the first or the latest packet with
 * data.
 *
 * Needs no privilege. The kernel keeps the SYN's headers if asked to (`TCP_SAVE_SYN`). On IPv4 it
 * reports the ToS byte of the packet that made the accepted socket (ip(7), `IP_PKTOPTIONS`), on
 * IPv6 the Traffic Class of the latest packet (RFC 2292 section 13).
 *
 * @module
 */

import { acceptedFrom, type Connection, DescriptorError } from "./fd.ts";
import { type Handshake, type Listening, type Socket, socketOf } from "./fd.ts";
import * as libc from "./libc.ts";
import { setTosAt } from "./mark.ts";
import { getOptionBytes, setOption } from "./calls.ts";
import { addressOf, AF_INET, AF_INET6, parseControl } from "./sockaddr.ts";

/** What arrived: bytes of 0 to 255, `null` for what the kernel does not report. */
export interface Arrived {
  /** The ToS byte or Traffic Class of the SYN. */
  readonly syn: number | null;
  /**
   * On IPv4, if `data` is unknown: the ToS byte of the packet that ended the handshake, which may
   * be the first data if the SYN is known: then the SYN-ACK was sent again.
   */
  readonly ack: number | null;
  /**
   * The ToS byte of the first packet with data, or on IPv6 the Traffic Class of the latest packet.
   * On IPv4 it is unknown if a part of the handshake was sent again, or with SYN cookies.
   */
  readonly data: number | null;
  /**
   * The SYN's sequence number (RFC 9293 section 3.4), 0 to 2^32 - 1: the client's own, also behind
   * NAT, but not behind a proxy.
   */
  readonly sequence: number | null;
}

/** What arrived from a client of a web server, and the mark of what it is sent. */
export interface ArrivedClient extends Arrived {
  /**
   * Marks what is sent on the connection from now on, as `setTos` does.
   *
   * @throws {DescriptorError} the connection is closed
   */
  setTos(tos: number): number;
}

/**
 * Makes a listener keep what {@linkcode readArrived} reports of the connections that it accepts.
 * Call it before clients connect. It accepts a client with its first data, or after 3 seconds
 * without, so it is not for protocols in which the server speaks first.
 *
 * @throws {LibcError} the kernel refuses
 * @throws {DescriptorError} the listener is closed, or shares its port (`reusePort`)
 */
export function keepArrivals(listener: Listening): void {
  const socket = socketOf(listener);
  // Makes the accepted socket of the first packet with data instead of the handshake's ACK. The
  // kernel rounds to 1, 3, 7 seconds, tcp(7). A client behind a satellite (0.6 s) that loses its
  // first data sends it again after 2.4 s; a client slower than 1 s is sent the SYN-ACK again
  // anyhow.
  setOption(socket.fd, libc.TCP_DEFER_ACCEPT, 3);
  // The last, so that a saved SYN implies the others.
  setOption(socket.fd, libc.IP_RECVTOS, 1);
  watchClass(socket);
  setOption(socket.fd, libc.TCP_SAVE_SYN, 1);
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

/** {@linkcode watchArriving} of a socket. */
export function watchClass({ fd, family }: Socket): void {
  if (family === AF_INET6) setOption(fd, libc.IPV6_RECVTCLASS, 1);
}

/**
 * What has arrived on a connection that was accepted after {@linkcode keepArrivals}, or that
 * {@linkcode watchArriving} watches. Call it first before the reply: on IPv4 `data` is unknown if
 * anything was sent again by then.
 *
 * @throws {DescriptorError} the connection is closed
 */
export function readArrived(connection: Connection): Arrived {
  const socket = socketOf(connection);
  return arrivedAt(socket, socket.handshake ??= readHandshake(socket.fd));
}

/**
 * What has arrived from a client of any TCP server on which {@linkcode keepArrivals} was called,
 * such as `Deno.serve`, and a way to mark the reply.
 *
 * ```ts
 * import { arrivedFrom, hex, keepArrivals } from "./mod.ts";
 * const server = Deno.serve({ port: 0, onListen() {} }, (_request, info) => {
 *   const { syn, data, setTos } = arrivedFrom(server, info.remoteAddr);
 *   setTos((data ?? 0) & 0xFC); // the reply has the mark of the request
 *   return new Response(`SYN ${hex(syn ?? 0)}, request ${hex(data ?? 0)}\n`);
 * });
 * keepArrivals(server);
 * console.log(await (await fetch(`http://127.0.0.1:${server.addr.port}/`)).text()); // SYN 0x00, …
 * await server.shutdown();
 * ```
 *
 * Of several requests on one connection IPv4 knows the first packet of the first one only. A call
 * takes some 30 µs; about 1 ms if the listener has any address (`0.0.0.0`, `::`), as all
 * descriptors are then looked through for a second connection with the client's port.
 *
 * @param remoteAddr the client, as `info.remoteAddr` of a handler
 * @throws {DescriptorError} the connection is closed; or the client has connections from one port
 * to two addresses of this host, of which the listener has both
 * @throws {TypeError} the socket is not TCP
 */
export function arrivedFrom(listener: Listening, remoteAddr: Deno.Addr): ArrivedClient {
  const socket = acceptedFrom(listener, remoteAddr);
  return {
    ...arrivedAt(socket, socket.handshake ??= readHandshake(socket.fd)),
    setTos(tos) {
      if (!socket.isOurs) throw new DescriptorError("the connection is closed");
      return setTosAt(socket.fd, socket.family, tos);
    },
  };
}

/** {@linkcode readArrived} of a socket that has been found, before its first reply. */
export function arrivedAt(
  socket: Pick<Socket, "fd" | "local">,
  handshake = readHandshake(socket.fd),
): Arrived {
  const { syn, sequence, endedWith } = handshake;
  // An IPv4-mapped connection reports what an IPv4 one does.
  if (addressOf(socket.local).length !== 4) {
    return { syn, ack: null, data: latestClass(socket), sequence };
  }
  const last = parseControl(getOptionBytes(socket.fd, libc.IP_PKTOPTIONS), libc.IP_TOS);
  return endedWith === "ack"
    ? { syn, ack: last, data: null, sequence }
    : { syn, ack: null, data: last, sequence };
}

/** Reads what the kernel hands out once, then forgets or changes. */
function readHandshake(fd: number): Handshake {
  const saved = getOptionBytes(fd, libc.TCP_SAVED_SYN);
  const syn = parseSyn(saved), sequence = parseSequence(saved);
  // struct tcp_info: tcpi_total_retrans, include/uapi/linux/tcp.h. With a SYN-ACK sent again,
  // either the ACK that answered it or the first data made the socket; with a SYN cookie the ACK
  // did.
  const info = getOptionBytes(fd, libc.TCP_INFO);
  const isSentAgain = (info[100] | info[101] | info[102] | info[103]) > 0;
  return { syn, sequence, endedWith: syn === null || isSentAgain ? "ack" : "data" };
}

/** The Traffic Class of the latest packet; `null` on IPv4. */
export function latestClass({ fd, local }: Pick<Socket, "fd" | "local">): number | null {
  if (addressOf(local).length === 4) return null;
  return parseControl(getOptionBytes(fd, libc.IPV6_2292PKTOPTIONS), libc.IPV6_TCLASS);
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

/** The sequence number of a saved SYN; `null` if no whole TCP header follows its IP header. */
export function parseSequence(headers: Uint8Array): number | null {
  const TCP = 6, isIPv4 = headers[0] >> 4 === 4;
  const at = isIPv4 ? 4 * (headers[0] & 0x0f) : 40;
  if (headers[isIPv4 ? 9 : 6] !== TCP || headers.length < at + 20) return null;
  return new DataView(headers.buffer, headers.byteOffset).getUint32(at + 4);
}

// ─── Replies on IPv4 ────────────────────────────────────────────────────────────────────────────

/**
 * Opens a raw socket that receives what arrives from the other end's address at this end's.
 *
 * @returns `null` without CAP_NET_RAW, and on IPv6, which needs none of this
 */
export function openReturned({ local, remote }: Socket): number | null {
  if (addressOf(local).length !== 4) return null;
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
  const address = new Uint8Array(16);
  address[0] = AF_INET;
  address.set(addressOf(sockaddr), 4);
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
  // At least five; none if the packet ends before.
  const words = packet[tcp + 12] >> 4;
  return isOurs && words >= 5 && length > tcp + 4 * words ? packet[1] : null;
}
