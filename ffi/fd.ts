/**
 * The descriptor behind a `Deno.Conn` or `Deno.Listener`.
 *
 * Deno does not tell it, so the process's descriptors are walked until one has the same ends. Within a network
 * namespace the two ends name exactly one TCP connection; a descriptor with only one of them is never taken.
 *
 * @module
 */

import {
  descriptorTableSize,
  getOption,
  getpeername,
  getsockname,
  lowestFreeDescriptor,
  openDescriptors,
  SO_ACCEPTCONN,
  SO_REUSEPORT,
  SO_TYPE,
  socketCookie,
} from "./libc.ts";
import { encode, endText, isAt, SOCKADDR_SIZE } from "./sockaddr.ts";

/** The two ends of a TCP connection, as `Deno.TcpConn`, `Deno.TlsConn` and `Dialed` have them. */
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
  /** `DescriptorError`. */
  override name = "DescriptorError";

  /**
   * The error of one search.
   *
   * @param lost the socket is there, but the other end has reset the connection
   */
  constructor(message: string, readonly lost: boolean = false) {
    super(message);
  }
}

/** A socket of this process, as the kernel knows it. */
export interface Socket {
  /** Its descriptor. */
  readonly fd: number;
  /** `AF_INET` or `AF_INET6`. */
  readonly family: number;
  /** The number that tells whether the descriptor still is that socket: also after a reset, when it has no peer. */
  readonly cookie: number | null;
}

/** A connected socket of this process. */
export interface ConnectedSocket extends Socket {
  /** This end. */
  readonly local: Deno.NetAddr;
  /** The other end. */
  readonly remote: Deno.NetAddr;
}

// Where sockets were found, so that they need not be searched for again.
const connections = new WeakMap<Connection, ConnectedSocket>();
const listeners = new WeakMap<Listening, Socket>();

/**
 * The file descriptor behind a TCP connection or listener, for use at once: after an `await` the socket may be closed
 * and the number given to another, so ask again.
 *
 * The search starts at the newest descriptor, so for a connection made just now its cost does not depend on how many
 * are open.
 *
 * ```ts
 * import { fdOf } from "./mod.ts";
 * const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
 * console.log(fdOf(listener));
 * listener.close();
 * ```
 *
 * @throws {DescriptorError} no descriptor has both ends, or two listeners share the address (`reusePort`)
 * @throws {TypeError} the socket is not TCP
 * @throws {CannotRunError} not Linux, or no libc
 * @throws {Deno.errors.NotCapable} `--allow-ffi` is missing
 */
export function fdOf(socket: Connection | Listening): number {
  return socketOf(socket).fd;
}

/** What {@linkcode fdOf} finds; the same errors. */
export function socketOf(socket: Connection | Listening): Socket {
  if (!("addr" in socket)) return connectionOf(socket);
  const known = listeners.get(socket);
  if (known !== undefined && isStill(known)) return known;
  const listener = findListener(tcp(socket.addr));
  listeners.set(socket, listener);
  return listener;
}

/** What {@linkcode fdOf} finds of a connection, with its ends; the same errors. */
export function connectionOf(connection: Connection): ConnectedSocket {
  const known = connections.get(connection);
  if (known !== undefined && isStill(known)) return known;
  const local = tcp(connection.localAddr), remote = tcp(connection.remoteAddr);
  const { fd, family, cookie } = findConnection(local, remote);
  const socket = { fd, family, cookie, local, remote };
  connections.set(connection, socket);
  return socket;
}

function isStill({ fd, cookie }: Socket): boolean {
  return cookie !== null && cookie === socketCookie(fd);
}

function findConnection(local: Deno.NetAddr, remote: Deno.NetAddr): Socket {
  const here = encode(local), there = encode(remote);
  const hasLocal = (fd: number) => getsockname(fd, found) && isAt(found, here) && isStream(fd);
  const fd = search((fd) => hasLocal(fd) && getpeername(fd, found) && isAt(found, there));
  if (fd !== null) return { fd, family: found[0], cookie: socketCookie(fd) };
  const ends = `${endText(local)} to ${endText(remote)}`;
  // After a reset the socket keeps its own end but has no peer any more.
  const isReset = (fd: number) =>
    hasLocal(fd) && !getpeername(fd, found) && getOption(fd, SO_ACCEPTCONN) === 0;
  if (search(isReset) !== null) {
    throw new DescriptorError(`the connection from ${ends} was reset`, true);
  }
  throw new DescriptorError(`no open descriptor connects ${ends}`);
}

function findListener(local: Deno.NetAddr): Socket {
  const here = encode(local);
  const isIt = (fd: number) =>
    getsockname(fd, found) && isAt(found, here) && isStream(fd) &&
    getOption(fd, SO_ACCEPTCONN) === 1;
  const fd = search(isIt);
  if (fd === null) throw new DescriptorError(`no open descriptor listens on ${endText(local)}`);
  const listener = { fd, family: found[0], cookie: socketCookie(fd) };
  // With SO_REUSEPORT several listeners may have one address, and nothing here tells which of them is meant.
  if (getOption(fd, SO_REUSEPORT) !== 0) {
    for (const other of openDescriptors(0, descriptorTableSize())) {
      if (other === fd || !isIt(other)) continue;
      throw new DescriptorError(
        `descriptors ${fd} and ${other} both listen on ${endText(local)}: which is meant?`,
      );
    }
  }
  return listener;
}

// What the kernel told last: right after a search, one of the ends of what it found.
const found = new Uint8Array(SOCKADDR_SIZE);

// A UDP socket may have the ports and addresses of a TCP one: they are numbered apart.
function isStream(fd: number): boolean {
  const SOCK_STREAM = 1;
  return getOption(fd, SO_TYPE) === SOCK_STREAM;
}

/** The first descriptor that passes, or `null`. */
function search(isIt: (fd: number) => boolean): number | null {
  // One connection after the other gets the same number again.
  if (isIt(lastFound)) return lastFound;
  for (const fd of newestFirst()) if (isIt(fd)) return lastFound = fd;
  return null;
}

let lastFound = 0;

// The kernel hands out the lowest free descriptor, so what was opened last sits under the lowest free one. Descriptors
// above it are there when an older one was closed since.
function* newestFirst(): Generator<number> {
  const free = lowestFreeDescriptor();
  for (let fd = free - 1; fd >= 0; fd--) yield fd;
  yield* openDescriptors(free + 1, descriptorTableSize());
}

function tcp(address: Deno.Addr): Deno.NetAddr {
  // The addresses that Deno.startTls copies have lost their transport.
  const { transport = "tcp" } = address as Partial<Deno.Addr>;
  if (transport !== "tcp") throw new TypeError(`this needs a TCP socket, not ${transport}`);
  return address as Deno.NetAddr;
}
