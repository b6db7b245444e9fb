/**
 * The descriptor behind a `Deno.Conn` or `Deno.Listener`.
 *
 * Deno does not expose it, so this module compares the ends of the process's sockets until one has
 * both. Within a network namespace the two ends name exactly one TCP connection, unless sockets are
 * bound to interfaces; a descriptor with only one of the ends is never taken.
 *
 * @module
 */

import { getOption, orLibcError } from "./calls.ts";
import * as libc from "./libc.ts";
import { decode, encode, formatAddress, sameEnd, SOCKADDR_SIZE } from "./sockaddr.ts";

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

/** What the kernel knows of the packets that made an accepted socket; for `arrived.ts`. */
export interface Handshake {
  /** The ToS byte or Traffic Class of the SYN; `null` if it was not saved. */
  readonly syn: number | null;
  /** The SYN's sequence number; likewise. */
  readonly sequence: number | null;
  /** The packet that made the socket: surely the first data, or perhaps the handshake's ACK. */
  readonly endedWith: "ack" | "data";
}

/** A connection of this process, good until an `await` or the next search. */
interface Found {
  /** Its descriptor. */
  readonly fd: number;
  /** `AF_INET` or `AF_INET6`. */
  readonly family: number;
  /** This end, as a `sockaddr` in the connection's own family. */
  readonly local: Uint8Array<ArrayBuffer>;
  /** The other end, likewise. */
  readonly remote: Uint8Array<ArrayBuffer>;
}

/** A TCP socket of this process: its descriptor, its ends, and whether it still is open. */
export class Socket {
  /** What the kernel hands out once. */
  handshake: Handshake | null = null;
  /** Called when a read or a write of `dial.ts` has waited, also if it goes on to wait. */
  onEvent: () => void = () => {};
  readonly #cookie: bigint | null;

  /**
   * Describes an open socket.
   *
   * @param fd its descriptor
   * @param family `AF_INET` or `AF_INET6`
   * @param local this end, as a `sockaddr` in the connection's own family
   * @param remote the other end, likewise; `null` for a listener
   */
  constructor(
    readonly fd: number,
    readonly family: number,
    readonly local: Uint8Array<ArrayBuffer>,
    readonly remote: Uint8Array<ArrayBuffer> | null,
  ) {
    this.#cookie = cookieAt(fd);
  }

  /** Whether the descriptor still is this socket, and not closed or another's. */
  get isOurs(): boolean {
    return this.#cookie !== null && this.#cookie === cookieAt(this.fd);
  }
}

const cookie = new BigUint64Array(1);

/**
 * The number that the kernel gives to one socket and never to another (`SO_COOKIE`, socket(7));
 * `null` if the descriptor is no open socket, or before Linux 4.12.
 */
function cookieAt(fd: number): bigint | null {
  return libc.getsockopt(fd, libc.SO_COOKIE, cookie) < 0 ? null : cookie[0];
}

// ─── Search ─────────────────────────────────────────────────────────────────────────────────────

// A reset connection has no peer to be found by, but its packets can still be read.
const known = new WeakMap<Connection, Socket>();

/** Makes {@linkcode socketOf} return this socket for a connection as long as it is open. */
export function remember(connection: Connection, socket: Socket): void {
  known.set(connection, socket);
}

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
export function fdOf(socket: Connection | Listening): number {
  return socketOf(socket).fd;
}

/** The socket behind a connection or listener; the errors of {@linkcode fdOf}. */
export function socketOf(socket: Connection | Listening): Socket {
  // A listener is searched for each time, as another one may have come to share its address.
  if ("addr" in socket) return findListener(socket);
  const before = known.get(socket);
  if (before?.isOurs) return before;
  const found = socketAt(findConnection(socket));
  known.set(socket, found);
  return found;
}

/** The socket behind a connection, for an owner that keeps it; the errors of {@linkcode fdOf}. */
export function findSocket(connection: Connection): Socket {
  return known.get(connection) ?? socketAt(findConnection(connection));
}

// What the latest search looked for: new memory for each costs a busy server 5 % of its replies.
const ends = { local: new Uint8Array(SOCKADDR_SIZE), remote: new Uint8Array(SOCKADDR_SIZE) };

/** Searches for a connection, for use at once; the errors of {@linkcode fdOf}. */
export function findConnection({ localAddr, remoteAddr }: Connection): Found {
  const local = encode(tcp(localAddr), 0, ends.local);
  const remote = encode(tcp(remoteAddr), 0, ends.remote);
  const words = () => `${formatAddress(tcp(localAddr))} to ${formatAddress(tcp(remoteAddr))}`;
  // The peer first: accepted connections all have the listener's end.
  const matches = (fd: number) => hasPeer(fd, remote) ? familyAt(fd, local) : null;
  const found = search(matches);
  if (found !== null) {
    // Two interfaces, or VRFs, may each have a connection with these ends, such as fe80::1.
    if (isBound(found.fd)) throwIfAmbiguous(found.fd, matches, `connect ${words()}`);
    return { ...found, local, remote };
  }
  // After a reset the socket keeps its own end but has no peer any more.
  const isReset = (fd: number) => {
    const family = familyAt(fd, local);
    const isIt = family !== null && libc.getpeername(fd, scratch) < 0 &&
      getOption(fd, libc.SO_ACCEPTCONN) === 0;
    return isIt ? family : null;
  };
  if (search(isReset) === null) throw new DescriptorError(`no open descriptor connects ${words()}`);
  throw new DescriptorError(`the connection from ${words()} was reset`, true);
}

const index = new Int32Array(1);

/** Whether a socket is bound to one interface; before Linux 5.1 this is unknown, so it may be. */
function isBound(fd: number): boolean {
  return libc.getsockopt(fd, libc.SO_BINDTOIFINDEX, index) < 0 || index[0] !== 0;
}

/**
 * The connection that a listener has accepted from a client, for programs that have no connection
 * object, as handlers of `Deno.serve`.
 *
 * @throws {DescriptorError} there is none, or more than one on several addresses of this host
 * @throws {TypeError} the socket is not TCP
 */
export function acceptedFrom({ addr }: Listening, remoteAddr: Deno.Addr): Socket {
  const { hostname, port } = tcp(addr), remote = encode(tcp(remoteAddr));
  const isAnyAddress = /^(0\.0\.0\.0|::)$/.test(hostname), given = encode(tcp(addr));
  const matches = (fd: number) => {
    const local = hasPeer(fd, remote) ? isAnyAddress ? localEnd(fd) : given : null;
    return local !== null && decode(local).port === port ? familyAt(fd, local) : null;
  };
  const found = search(matches);
  const ends = `${formatAddress(tcp(addr))} to ${formatAddress(tcp(remoteAddr))}`;
  if (found === null) throw new DescriptorError(`no open descriptor connects ${ends}`);
  if (isAnyAddress || isBound(found.fd)) throwIfAmbiguous(found.fd, matches, `connect ${ends}`);
  return socketAt({ ...found, local: localEnd(found.fd)!, remote });
}

function localEnd(fd: number): Uint8Array<ArrayBuffer> | null {
  const local = new Uint8Array(SOCKADDR_SIZE);
  return libc.getsockname(fd, local) < 0 ? null : local;
}

// One for each descriptor, so that what is known of a socket is known however it was found.
const sockets = new Map<number, Socket>();

function socketAt({ fd, family, local, remote }: Found): Socket {
  const before = sockets.get(fd);
  if (before?.isOurs) return before;
  const socket = new Socket(fd, family, local.slice(), remote.slice());
  sockets.set(fd, socket);
  return socket;
}

function findListener({ addr }: Listening): Socket {
  const local = encode(tcp(addr)), where = formatAddress(tcp(addr));
  const matches = (fd: number) => {
    const family = familyAt(fd, local);
    return family !== null && getOption(fd, libc.SO_ACCEPTCONN) === 1 ? family : null;
  };
  const found = search(matches);
  if (found === null) throw new DescriptorError(`no open descriptor listens on ${where}`);
  // With SO_REUSEPORT several listeners may have one address, and nothing here distinguishes them.
  if (getOption(found.fd, libc.SO_REUSEPORT) !== 0) {
    throwIfAmbiguous(found.fd, matches, `listen on ${where}`);
  }
  return new Socket(found.fd, found.family, local, null);
}

/** The address family of the socket at a descriptor if it is the one that is meant, else `null`. */
type Matches = (fd: number) => number | null;

/** @throws {DescriptorError} another descriptor matches as well, so it is unknown which is meant */
function throwIfAmbiguous(fd: number, matches: Matches, what: string): void {
  for (const other of openDescriptors(0)) {
    if (other === fd || matches(other) === null) continue;
    throw new DescriptorError(
      `descriptors ${fd} and ${other} both ${what}; cannot tell which is meant`,
    );
  }
}

// What the kernel writes an address into; no function leaves anything in it for another.
const scratch = new Uint8Array(SOCKADDR_SIZE);

/** The family of a TCP socket with this end. A UDP socket may have the same end. */
function familyAt(fd: number, local: Uint8Array): number | null {
  if (libc.getsockname(fd, scratch) !== 0 || !sameEnd(scratch, local)) return null;
  const family = scratch[0];
  // mptcpize(8) turns a program's TCP sockets into Multipath TCP, which takes the same options.
  const protocol = getOption(fd, libc.SO_PROTOCOL);
  return protocol === libc.IPPROTO_TCP || protocol === libc.IPPROTO_MPTCP ? family : null;
}

function hasPeer(fd: number, remote: Uint8Array): boolean {
  return libc.getpeername(fd, scratch) === 0 && sameEnd(scratch, remote);
}

/** Where the last search ended. */
let lastFound = 0;

/** The first descriptor that matches; `null` if none does. */
function search(matches: Matches): Pick<Found, "fd" | "family"> | null {
  for (const fd of candidates()) {
    const family = matches(fd);
    if (family !== null) return { fd: lastFound = fd, family };
  }
  return null;
}

/**
 * Descriptors that may be open. Connections that follow each other get the same ones, or, if many
 * clients are served at once, mostly the next one: without a look there first, 10,000 requests to
 * the built-in server take 1.9 times as long.
 */
function* candidates(): Generator<number> {
  for (const step of [1, 0, -1, 2, -2]) yield Math.max(0, lastFound + step);
  yield* newestFirst();
}

/**
 * Descriptors that may be open: the kernel hands out the lowest free one, so the newest socket is
 * right under that; those above it are open if an older descriptor was closed since.
 */
function* newestFirst(): Generator<number> {
  const free = lowestFree();
  for (let fd = free - 1; fd >= 0; fd--) yield fd;
  yield* openDescriptors(free + 1);
}

/** The lowest free descriptor, which a new one gets; the size of the table if none is free. */
function lowestFree(): number {
  const fd = libc.eventfd();
  if (fd < 0) return libc.getdtablesize();
  libc.close(fd);
  return fd;
}

/** The open descriptors from `from` up: poll(2) marks those that are not open. */
function* openDescriptors(from: number): Generator<number> {
  const AT_ONCE = 65536, to = libc.getdtablesize();
  for (let first = from; first < to; first += AT_ONCE) {
    const count = Math.min(AT_ONCE, to - first);
    const polled = new Int32Array(2 * count);
    for (let i = 0; i < count; i++) polled[2 * i] = first + i;
    pollNow(polled);
    const shorts = new Int16Array(polled.buffer);
    let isEmpty = true;
    for (let i = 0; i < count; i++) {
      if ((shorts[4 * i + 3] & libc.POLLNVAL) !== 0) continue;
      isEmpty = false;
      yield first + i;
    }
    // The table may have room for a billion, but descriptors are handed out from the lowest up.
    if (isEmpty) return;
  }
}

/** What poll(2) reports of one descriptor, now. */
export function polledEvents(fd: number): number {
  const polled = new Int32Array([fd, 0]);
  pollNow(polled);
  return polled[1] >> 16;
}

function pollNow(polled: Int32Array<ArrayBuffer>): void {
  let result;
  do result = libc.poll(polled); while (result === -libc.EINTR);
  orLibcError("poll", result);
}

function tcp(address: Deno.Addr): Deno.NetAddr {
  // The addresses that Deno.startTls copies have lost their transport.
  const { transport = "tcp" } = address as Partial<Deno.Addr>;
  if (transport !== "tcp") throw new TypeError(`this needs a TCP socket, not ${transport}`);
  return address as Deno.NetAddr;
}
