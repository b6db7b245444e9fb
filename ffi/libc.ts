/**
 * The libc functions used, each with its C types; `errno` becomes a {@linkcode LibcError}.
 *
 * This is the only module that calls `Deno.dlopen`, and it does so when a function is first called, not on import.
 * Opening costs more the more symbols it has, so they come in groups: one that every run needs and others that few do.
 *
 * @module
 */

/** The work cannot be done on this system at all: not Linux, or libc cannot be opened. */
export class CannotRunError extends Error {
  /** `CannotRunError`. */
  override name = "CannotRunError";
}

/** A libc call returned -1. */
export class LibcError extends Error {
  /** `LibcError`. */
  override name = "LibcError";

  /**
   * The error of one call.
   *
   * @param call the call in the words of its man page, such as `setsockopt(IP_TOS)`
   * @param errno the error number, see errno(3)
   */
  constructor(readonly call: string, readonly errno: number) {
    super(`${call}: ${strerror(errno)} (errno ${errno})`);
  }
}

/** Error numbers that the code tells apart, as on x86_64 and aarch64; errno(3). */
export const EAGAIN = 11,
  ENFILE = 23,
  EMFILE = 24,
  EPIPE = 32,
  ECONNRESET = 104,
  ETIMEDOUT = 110,
  ECONNREFUSED = 111,
  EINPROGRESS = 115;

/** A socket option: the numbers the kernel knows it by, and its name for messages. */
export interface SocketOption {
  /** The protocol level, such as 0 for `IPPROTO_IP`. */
  readonly level: number;
  /** The option's number within the level. */
  readonly option: number;
  /** The option's name in the man page. */
  readonly name: string;
}

const LIBC = "libc.so.6";

const SOL_SOCKET = 1;

/** Protocol numbers, which are also the levels of their options; protocols(5). */
export const IPPROTO_IP = 0, IPPROTO_TCP = 6, IPPROTO_IPV6 = 41;

/** socket(7) */
export const SO_TYPE: SocketOption = { level: SOL_SOCKET, option: 3, name: "SO_TYPE" };
/** socket(7) */
export const SO_ERROR: SocketOption = { level: SOL_SOCKET, option: 4, name: "SO_ERROR" };
/** socket(7) */
export const SO_REUSEPORT: SocketOption = { level: SOL_SOCKET, option: 15, name: "SO_REUSEPORT" };
/** socket(7) */
export const SO_ACCEPTCONN: SocketOption = { level: SOL_SOCKET, option: 30, name: "SO_ACCEPTCONN" };
/** Documentation/networking/timestamping.rst in the kernel's sources */
export const SO_TIMESTAMPING: SocketOption = {
  level: SOL_SOCKET,
  option: 37,
  name: "SO_TIMESTAMPING",
};
/** ip(7) */
export const IP_TOS: SocketOption = { level: IPPROTO_IP, option: 1, name: "IP_TOS" };
/** ipv6(7), RFC 3542 section 6.5 */
export const IPV6_TCLASS: SocketOption = { level: IPPROTO_IPV6, option: 67, name: "IPV6_TCLASS" };

/** ip(7) */
export const IP_PKTOPTIONS: SocketOption = { level: IPPROTO_IP, option: 9, name: "IP_PKTOPTIONS" };
/** ip(7) */
export const IP_RECVTOS: SocketOption = { level: IPPROTO_IP, option: 13, name: "IP_RECVTOS" };
/** RFC 2292 section 13; Linux keeps it for TCP beside the newer ones */
export const IPV6_2292PKTOPTIONS: SocketOption = {
  level: IPPROTO_IPV6,
  option: 6,
  name: "IPV6_2292PKTOPTIONS",
};
/** RFC 3542 section 6.5 */
export const IPV6_RECVTCLASS: SocketOption = {
  level: IPPROTO_IPV6,
  option: 66,
  name: "IPV6_RECVTCLASS",
};
/** include/uapi/linux/tcp.h in the kernel's sources */
export const TCP_SAVE_SYN: SocketOption = { level: IPPROTO_TCP, option: 27, name: "TCP_SAVE_SYN" };
/** include/uapi/linux/tcp.h in the kernel's sources */
export const TCP_SAVED_SYN: SocketOption = {
  level: IPPROTO_TCP,
  option: 28,
  name: "TCP_SAVED_SYN",
};

const RECV = {
  parameters: [
    "i32", // int sockfd
    "buffer", // void *buf
    "usize", // size_t len
    "i32", // int flags
  ],
  result: "isize",
} as const;

const SEND = {
  parameters: [
    "i32", // int sockfd
    "buffer", // const void *buf
    "usize", // size_t len
    "i32", // int flags
  ],
  result: "isize",
} as const;

const POLL = {
  parameters: [
    "buffer", // struct pollfd *fds
    "u64", // nfds_t nfds
    "i32", // int timeout
  ],
  result: "i32",
} as const;

const always = group({
  getsockname: {
    parameters: [
      "i32", // int sockfd
      "buffer", // struct sockaddr *addr
      "buffer", // socklen_t *addrlen
    ],
    result: "i32",
  },
  getpeername: {
    parameters: [
      "i32", // int sockfd
      "buffer", // struct sockaddr *addr
      "buffer", // socklen_t *addrlen
    ],
    result: "i32",
  },
  getsockopt: {
    parameters: [
      "i32", // int sockfd
      "i32", // int level
      "i32", // int optname
      "buffer", // void *optval
      "buffer", // socklen_t *optlen
    ],
    result: "i32",
  },
  setsockopt: {
    parameters: [
      "i32", // int sockfd
      "i32", // int level
      "i32", // int optname
      "buffer", // const void *optval
      "u32", // socklen_t optlen
    ],
    result: "i32",
  },
  recv: RECV,
  __errno_location: { parameters: [], result: "pointer" },
});

const searching = group({
  eventfd: {
    parameters: [
      "u32", // unsigned int initval
      "i32", // int flags
    ],
    result: "i32",
  },
  close: {
    parameters: [
      "i32", // int fd
    ],
    result: "i32",
  },
  getdtablesize: { parameters: [], result: "i32" },
});

const polling = group({ poll: POLL });

const dialing = group({
  socket: {
    parameters: [
      "i32", // int domain
      "i32", // int type
      "i32", // int protocol
    ],
    result: "i32",
  },
  connect: {
    parameters: [
      "i32", // int sockfd
      "buffer", // const struct sockaddr *addr
      "u32", // socklen_t addrlen
    ],
    result: "i32",
  },
  shutdown: {
    parameters: [
      "i32", // int sockfd
      "i32", // int how
    ],
    result: "i32",
  },
  send: SEND,
  pollInThread: { ...POLL, name: "poll", nonblocking: true },
  recvInThread: { ...RECV, name: "recv", nonblocking: true },
  sendInThread: { ...SEND, name: "send", nonblocking: true },
});

const flagging = group({
  fcntl: {
    // int fd, int cmd, ... /* arg */: on Linux, an int after the dots is passed as one before them
    parameters: ["i32", "i32", "i32"],
    result: "i32",
  },
});

const explaining = group({
  strerror: {
    parameters: [
      "i32", // int errnum
    ],
    result: "pointer",
  },
});

/**
 * Opens a library, for Linux only.
 *
 * @throws {CannotRunError} not Linux, or no such library
 * @throws {Deno.errors.NotCapable} `--allow-ffi` is missing
 */
export function open<S extends Deno.ForeignLibraryInterface>(
  file: string,
  symbols: S,
): Deno.DynamicLibrary<S> {
  if (Deno.build.os !== "linux") {
    throw new CannotRunError(`this needs Linux, and here is ${Deno.build.os}`);
  }
  try {
    return Deno.dlopen(file, symbols);
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) throw error;
    throw new CannotRunError(`cannot open ${file}, the GNU C library`, { cause: error });
  }
}

/**
 * Functions that are opened together, when one of them is first asked for.
 *
 * Opened as functions, each of them gets machine code of its own from Deno, which takes longer than all the calls of a
 * short run. So they are opened as mere addresses and called through these, which costs a microsecond a call.
 */
function group<const S extends Record<string, Deno.ForeignFunction>>(
  functions: S,
): () => Deno.StaticForeignLibraryInterface<S> {
  type Functions = Deno.StaticForeignLibraryInterface<S>;
  let opened: Functions | undefined;
  return () => opened ??= throughAddresses(functions) as Functions;
}

/** Opens functions of libc as addresses. */
function throughAddresses(
  functions: Record<string, Deno.ForeignFunction>,
): Record<string, unknown> {
  const statics: Record<string, Deno.ForeignStatic> = {};
  for (const name in functions) {
    statics[name] = { name: functions[name].name ?? name, type: "pointer" };
  }
  const { symbols } = open(LIBC, statics);
  const callable: Record<string, unknown> = {};
  for (const name in functions) {
    // The "value" of a symbol that is a pointer is where the symbol is.
    const pointer = new Deno.UnsafeFnPointer(
      symbols[name] as Deno.PointerObject<Deno.ForeignFunction>,
      functions[name],
    );
    callable[name] = pointer.call.bind(pointer);
  }
  return callable;
}

/** This thread's errno, once libc is open. */
let errno: Deno.UnsafePointerView | undefined;

/**
 * Makes a call that returns -1 for an error. errno is looked up before it, as looking it up may change it.
 *
 * @returns what the call returns, or the error number negated
 */
function attempt(call: () => number): number {
  errno ??= new Deno.UnsafePointerView(always().__errno_location()!);
  const result = call();
  return result >= 0 ? result : -errno.getInt32();
}

/** {@linkcode attempt} for a call that should not fail. @throws {LibcError} it did */
function check(name: string, call: () => number): number {
  const result = attempt(call);
  if (result < 0) throw new LibcError(name, -result);
  return result;
}

/** The words for an error number, strerror(3). */
export function strerror(number: number): string {
  const text = explaining().strerror(number);
  return text === null ? "unknown error" : new Deno.UnsafePointerView(text).getCString();
}

type Buffer = Uint8Array<ArrayBuffer>;

// Reused by every call: the functions below are synchronous, so no two are ever inside one.
const length = new Uint32Array(1);
const int = new Int32Array(1);
const cookie = new Uint32Array(2);

/** getsockname(2) into `address`; false where `fd` is no socket. */
export function getsockname(fd: number, address: Uint8Array<ArrayBuffer>): boolean {
  length[0] = address.length;
  return always().getsockname(fd, address, length) === 0;
}

/** getpeername(2) into `address`; false where `fd` is no connected socket. */
export function getpeername(fd: number, address: Uint8Array<ArrayBuffer>): boolean {
  length[0] = address.length;
  return always().getpeername(fd, address, length) === 0;
}

/** getsockopt(2) of an option that is an `int`. @throws {LibcError} the kernel refuses */
export function getOption(fd: number, option: SocketOption): number {
  length[0] = int.byteLength;
  const result = attempt(() => always().getsockopt(fd, option.level, option.option, int, length));
  if (result < 0) throw new LibcError(`getsockopt(${option.name})`, -result);
  return int[0];
}

/** getsockopt(2) of an option that is a structure. @returns its bytes, none where the kernel refuses */
export function getOptionBytes(
  fd: number,
  option: SocketOption,
  room: number,
): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(room);
  length[0] = room;
  const result = always().getsockopt(fd, option.level, option.option, bytes, length);
  return bytes.subarray(0, result === 0 ? Math.min(length[0], room) : 0);
}

/**
 * The number that the kernel gives a socket for good, never to another (`SO_COOKIE`, socket(7)); `null` where `fd` is no
 * open socket or the kernel is older than Linux 4.12.
 */
export function socketCookie(fd: number): number | null {
  const SO_COOKIE = 57;
  length[0] = cookie.byteLength;
  return always().getsockopt(fd, SOL_SOCKET, SO_COOKIE, cookie, length) === 0
    ? cookie[1] * 2 ** 32 + cookie[0]
    : null;
}

/** setsockopt(2) of an option that is an `int`. @throws {LibcError} the kernel refuses */
export function setOption(fd: number, option: SocketOption, value: number): void {
  int[0] = value;
  const result = attempt(() =>
    always().setsockopt(fd, option.level, option.option, int, int.byteLength)
  );
  if (result < 0) throw new LibcError(`setsockopt(${option.name})`, -result);
}

/**
 * One message from the socket's error queue, recv(2) with `MSG_ERRQUEUE | MSG_DONTWAIT`.
 *
 * @returns the number of bytes, at most `buffer.length`; `null` where there is none to be had
 */
export function receiveError(fd: number, buffer: Uint8Array<ArrayBuffer>): number | null {
  const size = always().recv(fd, buffer, BigInt(buffer.length), MSG_ERRQUEUE | MSG_DONTWAIT);
  return size < 0 ? null : Number(size);
}

/**
 * The lowest descriptor that is free, or the size of the table where none is: it is taken with eventfd(2), which needs
 * no descriptor to copy from, and given back.
 *
 * @throws {LibcError} the kernel refuses for another reason than a full table
 */
export function lowestFreeDescriptor(): number {
  const EFD_CLOEXEC = 0x80000;
  const fd = attempt(() => searching().eventfd(0, EFD_CLOEXEC));
  if (fd === -EMFILE || fd === -ENFILE) return descriptorTableSize();
  if (fd < 0) throw new LibcError("eventfd", -fd);
  close(fd);
  return fd;
}

/** One more than the highest descriptor this process may open, getdtablesize(3). */
export function descriptorTableSize(): number {
  return searching().getdtablesize();
}

/** The open descriptors among `from` to `to - 1`, in one poll(2), which marks those that are not open. */
export function* openDescriptors(from: number, to: number): Generator<number> {
  const POLLNVAL = 0x20, AT_ONCE = 65536;
  for (let first = from; first < to; first += AT_ONCE) {
    const count = Math.min(AT_ONCE, to - first);
    // struct pollfd { int fd; short events; short revents; }
    const table = new Int32Array(2 * count);
    for (let i = 0; i < count; i++) table[2 * i] = first + i;
    check("poll", () => polling().poll(table, BigInt(count), 0));
    const shorts = new Int16Array(table.buffer);
    for (let i = 0; i < count; i++) if ((shorts[4 * i + 3] & POLLNVAL) === 0) yield first + i;
  }
}

/** close(2). @throws {LibcError} the descriptor is not open */
export function close(fd: number): void {
  check("close", () => searching().close(fd));
}

/** A TCP socket of an address family, non-blocking and closed on exec, socket(2). @throws {LibcError} the kernel refuses */
export function tcpSocket(family: number): number {
  const SOCK_STREAM = 1, SOCK_NONBLOCK = 0x800, SOCK_CLOEXEC = 0x80000;
  const type = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
  return check("socket", () => dialing().socket(family, type, IPPROTO_TCP));
}

/** connect(2). @returns 0, or the error number: `EINPROGRESS` where it goes on by itself */
export function connect(fd: number, address: Uint8Array<ArrayBuffer>): number {
  return -attempt(() => dialing().connect(fd, address, address.length));
}

// What calls in other threads read or write: nobody else may hold it, and what nobody holds is given to others.
const lent = new Set<Buffer | Int32Array<ArrayBuffer>>();

async function lending<B extends Buffer | Int32Array<ArrayBuffer>, T>(
  buffer: B,
  call: (buffer: B) => Promise<T>,
): Promise<T> {
  lent.add(buffer);
  try {
    return await call(buffer);
  } finally {
    lent.delete(buffer);
  }
}

/** Waits in another thread, with poll(2), until a connection is made or has failed. */
export async function connected(fd: number): Promise<void> {
  const POLLOUT = 4;
  // struct pollfd { int fd; short events; short revents; }
  await lending(new Int32Array([fd, POLLOUT]), (table) => dialing().pollInThread(table, 1n, -1));
}

const MSG_PEEK = 0x2, MSG_DONTWAIT = 0x40, MSG_NOSIGNAL = 0x4000, MSG_ERRQUEUE = 0x2000;

/** What has come on a connection, recv(2). @returns bytes, 0 at the end; or the error number negated, `EAGAIN` for none */
export function receive(fd: number, buffer: Uint8Array): number {
  return attempt(() =>
    Number(always().recv(fd, buffer as Buffer, BigInt(buffer.length), MSG_DONTWAIT))
  );
}

/**
 * Waits in another thread, with recv(2), until a connection that blocks has something to read, or has ended. poll(2) would
 * not wait while there are looped packets to be taken.
 *
 * @returns false where the call failed: the connection's error went to that thread and is not told again
 */
export async function receivable(fd: number): Promise<boolean> {
  return await lending(
    new Uint8Array(1),
    (byte) => dialing().recvInThread(fd, byte, 1n, MSG_PEEK),
  ) >= 0;
}

/** Sends as much as there is room for, send(2). @returns bytes, or the error number negated, `EAGAIN` for no room */
export function send(fd: number, bytes: Uint8Array): number {
  return attempt(() =>
    Number(dialing().send(fd, bytes as Buffer, BigInt(bytes.length), MSG_DONTWAIT | MSG_NOSIGNAL))
  );
}

/** Sends all of it from another thread on a connection that blocks, send(2). @returns bytes, or -1 for an error */
export async function sendInThread(fd: number, bytes: Uint8Array): Promise<number> {
  const send = (buffer: Buffer) =>
    dialing().sendInThread(fd, buffer, BigInt(buffer.length), MSG_NOSIGNAL);
  return Number(await lending(bytes as Buffer, send));
}

/** Ends a connection, or an attempt at one, in both directions, shutdown(2); whoever waits for it wakes up. */
export function shutdown(fd: number): void {
  const SHUT_RDWR = 2;
  dialing().shutdown(fd, SHUT_RDWR);
}

/**
 * Makes calls on a descriptor wait, or fail with `EAGAIN` instead, fcntl(2).
 *
 * @throws {LibcError} the descriptor is not open
 */
export function setBlocking(fd: number, blocks: boolean): void {
  const F_GETFL = 3, F_SETFL = 4, O_NONBLOCK = 0x800;
  const flags = check("fcntl(F_GETFL)", () => flagging().fcntl(fd, F_GETFL, 0));
  const wanted = blocks ? flags & ~O_NONBLOCK : flags | O_NONBLOCK;
  if (wanted !== flags) check("fcntl(F_SETFL)", () => flagging().fcntl(fd, F_SETFL, wanted));
}
