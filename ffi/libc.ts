/**
 * The libc functions that this project calls, each with its C prototype.
 *
 * Each wrapper has its libc function's name and does no more than call it. It returns the call's
 * result, or the error number negated, as the kernel itself does; `getsockopt` returns the length
 * instead of 0. `epoll_wait`, whose errno stays in another thread, returns -1. None throws for what
 * a call returns: `calls.ts` does that. Comments say only what a man page does not.
 *
 * Only this module calls `Deno.dlopen`, and it does so at the first call, not on import. So any
 * wrapper may throw what {@linkcode open} throws.
 *
 * @module
 */

/** The work cannot be done on this system: it is not Linux, or libc cannot be opened. */
export class CannotRunError extends Error {
  /** `CannotRunError`. */
  override name = "CannotRunError";
}

/** Error numbers that the code distinguishes, the same on x86_64 and aarch64; errno(3). */
export const EINTR = 4, EAGAIN = 11, EPIPE = 32, ENETUNREACH = 101, ECONNRESET = 104;
export const ETIMEDOUT = 110, ECONNREFUSED = 111, EHOSTUNREACH = 113, EINPROGRESS = 115;

/** What poll(2) reports without being asked. */
export const POLLERR = 0x8, POLLHUP = 0x10, POLLNVAL = 0x20;

/** A socket option: its numbers, and its name for messages. */
export interface SocketOption {
  /** The protocol level, such as 0 for `IPPROTO_IP`. */
  readonly level: number;
  /** The option's number within the level. */
  readonly option: number;
  /** The option's name in the man page. */
  readonly name: string;
}

/** Protocol numbers, which are also the levels of their options; protocols(5). */
export const IPPROTO_ICMP = 1, IPPROTO_TCP = 6, IPPROTO_MPTCP = 262;
const IPPROTO_IP = 0, IPPROTO_IPV6 = 41, SOL_SOCKET = 1, SOL_RAW = 255;

const at = (level: number, option: number, name: string): SocketOption => ({ level, option, name });

/** Options of any socket: socket(7); the kernel's Documentation/networking/timestamping.rst. */
export const SO_REUSEADDR = at(SOL_SOCKET, 2, "SO_REUSEADDR"),
  SO_ERROR = at(SOL_SOCKET, 4, "SO_ERROR"),
  SO_LINGER = at(SOL_SOCKET, 13, "SO_LINGER"),
  SO_REUSEPORT = at(SOL_SOCKET, 15, "SO_REUSEPORT"),
  SO_ATTACH_FILTER = at(SOL_SOCKET, 26, "SO_ATTACH_FILTER"),
  SO_ACCEPTCONN = at(SOL_SOCKET, 30, "SO_ACCEPTCONN"),
  SO_TIMESTAMPNS = at(SOL_SOCKET, 35, "SO_TIMESTAMPNS"),
  SO_TIMESTAMPING = at(SOL_SOCKET, 37, "SO_TIMESTAMPING"),
  SO_PROTOCOL = at(SOL_SOCKET, 38, "SO_PROTOCOL"),
  SO_COOKIE = at(SOL_SOCKET, 57, "SO_COOKIE"),
  SO_BINDTOIFINDEX = at(SOL_SOCKET, 62, "SO_BINDTOIFINDEX");

/** Options of IP sockets: ip(7); ipv6(7), RFC 3542 section 6.5, RFC 2292 section 13. */
export const IP_TOS = at(IPPROTO_IP, 1, "IP_TOS"),
  IP_TTL = at(IPPROTO_IP, 2, "IP_TTL"),
  IP_PKTOPTIONS = at(IPPROTO_IP, 9, "IP_PKTOPTIONS"),
  IP_RECVERR = at(IPPROTO_IP, 11, "IP_RECVERR"),
  IP_RECVTOS = at(IPPROTO_IP, 13, "IP_RECVTOS"),
  IPV6_2292PKTOPTIONS = at(IPPROTO_IPV6, 6, "IPV6_2292PKTOPTIONS"),
  IPV6_UNICAST_HOPS = at(IPPROTO_IPV6, 16, "IPV6_UNICAST_HOPS"),
  IPV6_RECVERR = at(IPPROTO_IPV6, 25, "IPV6_RECVERR"),
  IPV6_FLOWINFO_SEND = at(IPPROTO_IPV6, 33, "IPV6_FLOWINFO_SEND"),
  IPV6_RECVTCLASS = at(IPPROTO_IPV6, 66, "IPV6_RECVTCLASS"),
  IPV6_TCLASS = at(IPPROTO_IPV6, 67, "IPV6_TCLASS"),
  IPV6_AUTOFLOWLABEL = at(IPPROTO_IPV6, 70, "IPV6_AUTOFLOWLABEL"),
  ICMP_FILTER = at(SOL_RAW, 1, "ICMP_FILTER");

/** Options of TCP sockets: tcp(7), include/uapi/linux/tcp.h in the kernel's sources. */
export const TCP_NODELAY = at(IPPROTO_TCP, 1, "TCP_NODELAY"),
  TCP_MAXSEG = at(IPPROTO_TCP, 2, "TCP_MAXSEG"),
  TCP_DEFER_ACCEPT = at(IPPROTO_TCP, 9, "TCP_DEFER_ACCEPT"),
  TCP_INFO = at(IPPROTO_TCP, 11, "TCP_INFO"),
  TCP_SAVE_SYN = at(IPPROTO_TCP, 27, "TCP_SAVE_SYN"),
  TCP_SAVED_SYN = at(IPPROTO_TCP, 28, "TCP_SAVED_SYN");

/** Flags of recv(2) and send(2). */
export const MSG_CTRUNC = 0x8, MSG_DONTWAIT = 0x40, MSG_EOR = 0x80;
export const MSG_ERRQUEUE = 0x2000, MSG_NOSIGNAL = 0x4000;

const SOCK_STREAM = 1;
/** The type of a raw socket, socket(2). */
export const SOCK_RAW = 3;

// ─── The table ──────────────────────────────────────────────────────────────────────────────────

const TABLE = {
  // int socket(int domain, int type, int protocol);
  socket: { parameters: ["i32", "i32", "i32"], result: "i32" },
  // int connect(int sockfd, const struct sockaddr *addr, socklen_t addrlen);
  connect: { parameters: ["i32", "buffer", "u32"], result: "i32" },
  // int bind(int sockfd, const struct sockaddr *addr, socklen_t addrlen);
  bind: { parameters: ["i32", "buffer", "u32"], result: "i32" },
  // int listen(int sockfd, int backlog);
  listen: { parameters: ["i32", "i32"], result: "i32" },
  // int accept(int sockfd, struct sockaddr *addr, socklen_t *addrlen);
  accept: { parameters: ["i32", "pointer", "pointer"], result: "i32" },
  // int shutdown(int sockfd, int how);
  shutdown: { parameters: ["i32", "i32"], result: "i32" },
  // int close(int fd);
  close: { parameters: ["i32"], result: "i32" },
  // int getsockname(int sockfd, struct sockaddr *addr, socklen_t *addrlen);
  getsockname: { parameters: ["i32", "buffer", "buffer"], result: "i32" },
  // int getpeername(int sockfd, struct sockaddr *addr, socklen_t *addrlen);
  getpeername: { parameters: ["i32", "buffer", "buffer"], result: "i32" },
  // int getsockopt(int sockfd, int level, int optname, void *optval, socklen_t *optlen);
  getsockopt: { parameters: ["i32", "i32", "i32", "buffer", "buffer"], result: "i32" },
  // int setsockopt(int sockfd, int level, int optname, const void *optval, socklen_t optlen);
  setsockopt: { parameters: ["i32", "i32", "i32", "buffer", "u32"], result: "i32" },
  // ssize_t recv(int sockfd, void *buf, size_t len, int flags);
  recv: { parameters: ["i32", "buffer", "usize", "i32"], result: "isize" },
  // ssize_t recvmsg(int sockfd, struct msghdr *msg, int flags);
  recvmsg: { parameters: ["i32", "buffer", "i32"], result: "isize" },
  // ssize_t send(int sockfd, const void *buf, size_t len, int flags);
  send: { parameters: ["i32", "buffer", "usize", "i32"], result: "isize" },
  // int getdtablesize(void);
  getdtablesize: { parameters: [], result: "i32" },
  // int fcntl(int fd, int cmd, ...); on Linux, a variadic int is passed like a named one
  fcntl: { parameters: ["i32", "i32", "i32"], result: "i32" },
  // int poll(struct pollfd *fds, nfds_t nfds, int timeout);
  poll: { parameters: ["buffer", "u64", "i32"], result: "i32" },
  // int eventfd(unsigned int initval, int flags);
  eventfd: { parameters: ["u32", "i32"], result: "i32" },
  // int eventfd_write(int fd, eventfd_t value);
  eventfd_write: { parameters: ["i32", "u64"], result: "i32" },
  // int epoll_create1(int flags);
  epoll_create1: { parameters: ["i32"], result: "i32" },
  // int epoll_ctl(int epfd, int op, int fd, struct epoll_event *event);
  epoll_ctl: { parameters: ["i32", "i32", "i32", "buffer"], result: "i32" },
  // int epoll_wait(int epfd, struct epoll_event *events, int maxevents, int timeout);
  epoll_wait: { parameters: ["i32", "buffer", "i32", "i32"], result: "i32", nonblocking: true },
  // unsigned int if_nametoindex(const char *ifname);
  if_nametoindex: { parameters: ["buffer"], result: "u32" },
  // int getifaddrs(struct ifaddrs **ifap);
  getifaddrs: { parameters: ["buffer"], result: "i32" },
  // void freeifaddrs(struct ifaddrs *ifa);
  freeifaddrs: { parameters: ["pointer"], result: "void" },
  // char *getenv(const char *name);
  getenv: { parameters: ["buffer"], result: "pointer" },
  // char *strerror(int errnum);
  strerror: { parameters: ["i32"], result: "pointer" },
  // int *__errno_location(void);
  __errno_location: { parameters: [], result: "pointer" },
} as const;

type Table = Readonly<Record<string, Deno.ForeignFunction>>;
type Functions<T extends Table> = { readonly [N in keyof T]: Deno.UnsafeFnPointer<T[N]>["call"] };

/**
 * Opens functions of a library, as addresses, which `called` is told of when they are first called.
 *
 * @throws {CannotRunError} not Linux, or no such library or function
 * @throws {Deno.errors.NotCapable} `--allow-ffi` is missing
 */
export function open<T extends Table>(
  library: string,
  table: T,
  called: Record<string, Deno.ForeignFunction> = {},
): Functions<T> {
  if (Deno.build.os !== "linux") {
    throw new CannotRunError(`this needs Linux, and here is ${Deno.build.os}`);
  }
  const statics: Record<string, { type: "pointer" }> = {}, functions = {};
  for (const name in table) statics[name] = { type: "pointer" };
  let symbols: Record<string, unknown>;
  try {
    symbols = Deno.dlopen(library, statics).symbols;
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) throw error;
    throw new CannotRunError(`cannot open ${library}, the GNU C library`, { cause: error });
  }
  for (const name in table) {
    let call: unknown;
    const get = () => {
      if (call !== undefined) return call;
      called[name] = table[name];
      // The "value" of a symbol that is a pointer is the symbol's address.
      const address = symbols[name] as Deno.PointerObject<Deno.ForeignFunction>;
      const pointer = new Deno.UnsafeFnPointer(address, called[name]);
      return call = pointer.call.bind(pointer);
    };
    Object.defineProperty(functions, name, { get });
  }
  return functions as Functions<T>;
}

const LIBC = "libc.so.6", MANY = 100;
const called: Record<string, Deno.ForeignFunction> = {};
let opened: Functions<typeof TABLE> | undefined, uses = 0;
/** This thread's errno. */
let errno: Deno.UnsafePointerView;

/**
 * libc's functions. Deno compiles a trampoline for each symbol that is opened as a function: 0.2 ms
 * each, 7 ms for the table. So they are addresses; when a process has made many calls, those that
 * it has made get trampolines, which save 2.5 µs a call and a tenth of the time of a series.
 */
function libc(): Functions<typeof TABLE> {
  if (opened === undefined) {
    opened = open(LIBC, TABLE, called);
    errno = new Deno.UnsafePointerView(opened.__errno_location()!);
  }
  if (++uses === MANY) {
    const compiled = Deno.dlopen(LIBC, called).symbols;
    opened = { __proto__: opened, ...compiled } as unknown as typeof opened;
  }
  return opened;
}

/**
 * The result of a call, or the negated errno in place of −1. Must be the first call after it.
 *
 * V8 may still come between: once in a process, when a thread first waits for one of its locks, it
 * looks for a file in /sys that is seldom there, and errno is ENOENT (this thread's in 1 of 4,000
 * runs on one busy machine, in 1 of 30 on another). So what is done next depends on the socket, not
 * on errno alone.
 */
function orErrno(result: number | bigint): number {
  return result >= 0 ? Number(result) : -errno.getInt32();
}

// ─── The wrappers ───────────────────────────────────────────────────────────────────────────────

type Bytes = Uint8Array<ArrayBuffer>;
type View = ArrayBufferView<ArrayBuffer>;

// Reused by every call: the wrappers are synchronous, so no two are ever inside one.
const length = new Uint32Array(1);

/** A TCP socket unless told otherwise; non-blocking and closed on exec. */
export function socket(family: number, type = SOCK_STREAM, protocol = IPPROTO_TCP): number {
  const SOCK_NONBLOCK = 0x800, SOCK_CLOEXEC = 0x80000;
  return orErrno(libc().socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, protocol));
}

/** Of a non-blocking socket: `-EINPROGRESS`, unless it fails at once. */
export function connect(fd: number, address: Bytes): number {
  return orErrno(libc().connect(fd, address, address.length));
}

export function bind(fd: number, address: Bytes): number {
  return orErrno(libc().bind(fd, address, address.length));
}

/** For a single connection. */
export const listen = (fd: number) => orErrno(libc().listen(fd, 1));
export const accept = (fd: number) => orErrno(libc().accept(fd, null, null));
const SHUT_RDWR = 2;
export const shutdown = (fd: number) => orErrno(libc().shutdown(fd, SHUT_RDWR));
export const close = (fd: number) => orErrno(libc().close(fd));

export function getsockname(fd: number, address: Bytes): number {
  length[0] = address.length;
  return orErrno(libc().getsockname(fd, address, length));
}

export function getpeername(fd: number, address: Bytes): number {
  length[0] = address.length;
  return orErrno(libc().getpeername(fd, address, length));
}

/** @returns how many bytes the option has, at most as many as fit */
export function getsockopt(fd: number, { level, option }: SocketOption, value: View): number {
  length[0] = value.byteLength;
  const result = orErrno(libc().getsockopt(fd, level, option, value, length));
  return result < 0 ? result : length[0];
}

/** @param value one `int`, or a structure of several */
export function setsockopt(fd: number, { level, option }: SocketOption, value: View): number {
  return orErrno(libc().setsockopt(fd, level, option, value, value.byteLength));
}

export function recv(fd: number, buffer: Uint8Array, flags: number): number {
  return orErrno(libc().recv(fd, buffer as Bytes, BigInt(buffer.length), flags));
}

/** @param message a `struct msghdr` at the start of a block that also holds what it points to */
export function recvmsg(fd: number, message: Bytes, flags: number): number {
  return orErrno(libc().recvmsg(fd, message, flags));
}

export function send(fd: number, bytes: Uint8Array, flags: number): number {
  return orErrno(libc().send(fd, bytes as Bytes, BigInt(bytes.length), flags));
}

export const getdtablesize = () => libc().getdtablesize();

/** A command that takes an `int`. */
export function fcntl(fd: number, command: number, argument: number): number {
  return orErrno(libc().fcntl(fd, command, argument));
}

/** Does not wait. @param polled `struct pollfd { int fd; short events, revents; }` */
export function poll(polled: Int32Array<ArrayBuffer>): number {
  return orErrno(libc().poll(polled, BigInt(polled.length / 2), 0));
}

/** Non-blocking, and closed on exec. */
export function eventfd(): number {
  const EFD_CLOEXEC = 0x80000, EFD_NONBLOCK = 0x800;
  return orErrno(libc().eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

export const eventfd_write = (fd: number) => orErrno(libc().eventfd_write(fd, 1n));

/** Closed on exec. */
export function epoll_create1(): number {
  const EPOLL_CLOEXEC = 0x80000;
  return orErrno(libc().epoll_create1(EPOLL_CLOEXEC));
}

export function epoll_ctl(epoll: number, operation: number, fd: number, event: Bytes): number {
  return orErrno(libc().epoll_ctl(epoll, operation, fd, event));
}

/** In another thread, without a time limit. @param events stays referenced until it returns */
export function epoll_wait(epoll: number, events: Bytes, most: number): Promise<number> {
  return libc().epoll_wait(epoll, events, most, -1);
}

const cString = (text: string) => new TextEncoder().encode(`${text}\0`);
const textAt = (pointer: Deno.PointerObject) => new Deno.UnsafePointerView(pointer).getCString();

/** 0 if there is no such interface. */
export const if_nametoindex = (name: string) => libc().if_nametoindex(cString(name));

/** @param list gets the address of the first entry, for {@linkcode freeifaddrs} */
export const getifaddrs = (list: BigUint64Array<ArrayBuffer>) => orErrno(libc().getifaddrs(list));
export const freeifaddrs = (list: Deno.PointerValue) => libc().freeifaddrs(list);

/** `null` if the variable is not set. */
export function getenv(name: string): string | null {
  const value = libc().getenv(cString(name));
  return value === null ? null : textAt(value);
}

export const strerror = (errno: number) => textAt(libc().strerror(errno)!);
