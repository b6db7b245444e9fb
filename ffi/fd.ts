/**
 * The descriptor behind a `Deno.Conn` or `Deno.Listener`.
 *
 * Deno does not expose it, so this module compares the ends of the process's sockets until one has
 * both. Within a network namespace the two ends name exactly one TCP connection, unless sockets are
 * bound to interfaces; a descriptor with only one of the ends is never taken.
 *
 * @module
 */

import * as libc from "./libc.ts";
import { encode, formatAddress, sameEnd, SOCKADDR_SIZE } from "./sockaddr.ts";

/** The two ends of a TCP connection, as `Deno.TcpConn`, `Deno.TlsConn` and `DialedConn` have. */
export interface Connection {
  /** This end. */
  readonly localAddr: Deno.Addr;
  /** The other end. */
  readonly remoteAddr: Deno.Addr;
}

/** A listening TCP socket, as `Deno.TcpListener`. */
export interface Listening {
  /** Where it listens. */
  readonly addr: Deno.Addr;
}

/** No descriptor of this process, or more than one, has the ends asked for. */
export class DescriptorError extends Error {
  /**
   * The error of one search.
   *
   * @param lost the socket is there, but the other end has reset the connection
   */
  constructor(message: string, readonly lost: boolean = false) {
    super(message);
    this.name = "DescriptorError";
  }
}

/** A socket of this process, as the kernel knows it. */
export interface Socket {
  /** Its descriptor. */
  readonly fd: number;
  /** `AF_INET` or `AF_INET6`. */
  readonly family: number;
}

/** A connected socket of this process. */
export interface ConnectedSocket extends Socket {
  /** This end, as a `sockaddr` in the connection's own family. */
  readonly local: Uint8Array<ArrayBuffer>;
  /** The other end, likewise. */
  readonly remote: Uint8Array<ArrayBuffer>;
}

// A reset connection has no peer to be found by, but its packets can still be read. The cookie
// shows whether a descriptor still is the socket that was found.
const connections = new WeakMap<Connection, { socket: ConnectedSocket; cookie: bigint | null }>();

/**
 * The file descriptor behind a TCP connection or listener, for use at once: after an `await` the
 * socket may be closed and the number given to another, so ask again.
 *
 * The search starts at the newest descriptor, so for a connection made just now its cost does not
 * depend on how many are open.
 *
 * ```ts
 * import { fdOf } from "./mod.ts";
 * const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
 * console.log(fdOf(listener));
 * listener.close();
 * ```
 *
 * @throws {DescriptorError} no descriptor has both ends, or more than one has
 * @throws {TypeError} the socket is not TCP
 * @throws {CannotRunError} not Linux, or no libc
 * @throws {Deno.errors.NotCapable} `--allow-ffi` is missing
 */
export function fdOf(socket: Connection | Listening | Socket): number {
  return socketOf(socket).fd;
}

/** The socket behind a connection or listener, or the socket itself; throws as {@linkcode fdOf}. */
export function socketOf(socket: Connection | Listening | Socket): Socket {
  if ("addr" in socket) return findListener(socket);
  return "family" in socket ? socket : connectionOf(socket);
}

/** The socket behind a connection, also after a reset if it was found before. */
export function connectionOf(connection: Connection | ConnectedSocket): ConnectedSocket {
  if ("family" in connection) return connection;
  const known = connections.get(connection);
  const isKnown = known?.cookie && known.cookie === libc.socketCookie(known.socket.fd);
  if (isKnown) return known.socket;
  const socket = findConnection(connection);
  connections.set(connection, { socket, cookie: libc.socketCookie(socket.fd) });
  return socket;
}

/** Searches for a connection's socket; the errors of {@linkcode fdOf}. */
export function findConnection({ localAddr, remoteAddr }: Connection): ConnectedSocket {
  const local = encode(tcp(localAddr)), remote = encode(tcp(remoteAddr));
  const ends = () => `${formatAddress(tcp(localAddr))} to ${formatAddress(tcp(remoteAddr))}`;
  // The peer first: accepted connections all have the listener's end.
  const matches = (fd: number) => hasPeer(fd, remote) && isAt(fd, local);
  const fd = search(matches);
  if (fd !== null) {
    const found = { fd, family: address[0], local, remote };
    // Two interfaces, or VRFs, may each have a connection with these ends, such as fe80::1.
    if (isBound(fd)) refuseTwins(fd, matches, `connect ${ends()}`);
    return found;
  }
  // After a reset the socket keeps its own end but has no peer any more.
  const isReset = (fd: number) =>
    isAt(fd, local) && libc.getpeername(fd, address) < 0 &&
    libc.getOption(fd, libc.SO_ACCEPTCONN) === 0;
  if (search(isReset) === null) throw new DescriptorError(`no open descriptor connects ${ends()}`);
  throw new DescriptorError(`the connection from ${ends()} was reset`, true);
}

/** Whether a socket is bound to one interface; before Linux 5.1 this is unknown, so it may be. */
function isBound(fd: number): boolean {
  return libc.getsockopt(fd, libc.SO_BINDTOIFINDEX, index) < 0 || index[0] !== 0;
}

function findListener({ addr }: Listening): Socket {
  const local = encode(tcp(addr));
  const matches = (fd: number) => isAt(fd, local) && libc.getOption(fd, libc.SO_ACCEPTCONN) === 1;
  const fd = search(matches);
  const where = formatAddress(tcp(addr));
  if (fd === null) throw new DescriptorError(`no open descriptor listens on ${where}`);
  const listener = { fd, family: address[0] };
  // With SO_REUSEPORT several listeners may have one address, and nothing here distinguishes them.
  if (libc.getOption(fd, libc.SO_REUSEPORT) !== 0) refuseTwins(fd, matches, `listen on ${where}`);
  return listener;
}

/** @throws {DescriptorError} another descriptor matches as well, so nobody knows which is meant */
function refuseTwins(fd: number, matches: (fd: number) => boolean, what: string): void {
  for (const other of libc.openDescriptors(0)) {
    if (other === fd || !matches(other)) continue;
    throw new DescriptorError(
      `descriptors ${fd} and ${other} both ${what}; cannot tell which is meant`,
    );
  }
}

const index = new Int32Array(1);
// The address that the kernel returned last: after a search, an end of the socket that was found.
const address = new Uint8Array(SOCKADDR_SIZE);

/** Whether a descriptor is a TCP socket with this end. A UDP socket may have the same one. */
function isAt(fd: number, local: Uint8Array): boolean {
  return libc.getsockname(fd, address) === 0 && sameEnd(address, local) &&
    libc.getOption(fd, libc.SO_PROTOCOL) === libc.IPPROTO_TCP;
}

function hasPeer(fd: number, remote: Uint8Array): boolean {
  return libc.getpeername(fd, address) === 0 && sameEnd(address, remote);
}

let lastFound = 0, lastStep = 0;

/** The first descriptor that matches, or `null`. */
function search(matches: (fd: number) => boolean): number | null {
  // Connections that follow each other get the same descriptor again, or the next one if those
  // before are still open.
  for (const step of [lastStep, 1 - lastStep]) {
    if (!matches(lastFound + step)) continue;
    lastStep = step;
    return lastFound += step;
  }
  // The kernel hands out the lowest free descriptor, so the newest socket is right under the lowest
  // free one. Others are above it if an older descriptor was closed since.
  const free = libc.lowestFreeDescriptor();
  for (let fd = free - 1; fd >= 0; fd--) if (matches(fd)) return lastFound = fd;
  for (const fd of libc.openDescriptors(free + 1)) {
    if (matches(fd)) return lastFound = fd;
  }
  return null;
}

function tcp(address: Deno.Addr): Deno.NetAddr {
  // The addresses that Deno.startTls copies have lost their transport.
  const { transport = "tcp" } = address as Partial<Deno.Addr>;
  if (transport !== "tcp") throw new TypeError(`this needs a TCP socket, not ${transport}`);
  return address as Deno.NetAddr;
}
