/**
 * The libc functions that this project calls, each with its C prototype.
 *
 * Each wrapper has its libc function's name and does no more than call it. It returns the call's
 * result, or the error number negated, as the kernel itself does; `getsockopt` returns the length
 * instead of 0. `epoll_wait`, whose errno stays in another thread, returns -1. None throws for what
 * a call returns: `calls.ts` does that.
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
export const EINTR = 4,
  EAGAIN = 11,
  EPIPE = 32,
  ENETUNREACH = 101,
  ECONNRESET = 104,
  ETIMEDOUT = 110,
  ECONNREFUSED = 111,
  EHOSTUNREACH = 113,
  EINPROGRESS = 115;

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
export const IPPROTO_ICMP = 1, IPPROTO_TCP = 6, IPPROTO_IPV6 = 41, IPPROTO_MPTCP = 262;
const IPPROTO_IP = 0;

const SOL_SOCKET = 1, SOL_RAW = 255;
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
export const MSG_CTRUNC = 0x8,
  MSG_DONTWAIT = 0x40,
  MSG_EOR = 0x80,
  MSG_ERRQUEUE = 0x2000,
  MSG_NOSIGNAL = 0x4000;

const SOCK_STREAM = 1;
/** The type of a raw socket, socket(2). */
export const SOCK_RAW = 3;

const LIBC = "libc.so.6";

// ─── The tables ─────────────────────────────────────────────────────────────────────────────────

type Table = Readonly<Record<string, Deno.ForeignFunction>>;
type Functions<T extends Table> = { [N in keyof T]: Deno.UnsafeFnPointer<T[N]>["call"] };

/** What every run calls. */
const hot = table({
  // int getsockname(int sockfd, struct sockaddr *addr, socklen_t *addrlen);
  getsockname: { parameters: ["i32", "buffer", "buffer"], result: "i32" },
  // int getpeername(int sockfd, struct sockaddr *addr, socklen_t *addrlen);
  getpeername: { parameters: ["i32", "buffer", "buffer"], result: "i32" },
  // int getsockopt(int sockfd, int level, int optname, void *optval, socklen_t *optlen);
  getsockopt: { parameters: ["i32", "i32", "i32", "buffer", "buffer"], result: "i32" },
  // int setsockopt(int sockfd, int level, int optname, const void *optval, socklen_t optlen);
  setsockopt: { parameters: ["i32", "i32", "i32", "buffer", "u32"], result: "i32" },
  // int socket(int domain, int type, int protocol);
  socket: { parameters: ["i32", "i32", "i32"], result: "i32" },
  // int connect(int sockfd, const struct sockaddr *addr, socklen_t addrlen);
  connect: { parameters: ["i32", "buffer", "u32"], result: "i32" },
  // int bind(int sockfd, const struct sockaddr *addr, socklen_t addrlen);
  bind: { parameters: ["i32", "buffer", "u32"], result: "i32" },
  // ssize_t recv(int sockfd, void *buf, size_t len, int flags);
  recv: { parameters: ["i32", "buffer", "usize", "i32"], result: "isize" },
  // int eventfd(unsigned int initval, int flags);
  eventfd: { parameters: ["u32", "i32"], result: "i32" },
  // int close(int fd);
  close: { parameters: ["i32"], result: "i32" },
  // int *__errno_location(void);
  __errno_location: { parameters: [], result: "pointer" },
});

/** What large processes, polling and errors call. */
const cold = table({
  // int shutdown(int sockfd, int how);
  shutdown: { parameters: ["i32", "i32"], result: "i32" },
  // ssize_t send(int sockfd, const void *buf, size_t len, int flags);
  send: { parameters: ["i32", "buffer", "usize", "i32"], result: "isize" },
  // ssize_t recvmsg(int sockfd, struct msghdr *msg, int flags);
  recvmsg: { parameters: ["i32", "buffer", "i32"], result: "isize" },
  // int epoll_create1(int flags);
  epoll_create1: { parameters: ["i32"], result: "i32" },
  // int epoll_ctl(int epfd, int op, int fd, struct epoll_event *event);
  epoll_ctl: { parameters: ["i32", "i32", "i32", "buffer"], result: "i32" },
  // int epoll_wait(int epfd, struct epoll_event *events, int maxevents, int timeout);
  epoll_wait: { parameters: ["i32", "buffer", "i32", "i32"], result: "i32", nonblocking: true },
  // int fcntl(int fd, int cmd, ...); on Linux, a variadic int is passed like a named one
  fcntl: { parameters: ["i32", "i32", "i32"], result: "i32" },
  // int eventfd_write(int fd, eventfd_t value);
  eventfd_write: { parameters: ["i32", "u64"], result: "i32" },
  // int poll(struct pollfd *fds, nfds_t nfds, int timeout);
  poll: { parameters: ["buffer", "u64", "i32"], result: "i32" },
  // int getdtablesize(void);
  getdtablesize: { parameters: [], result: "i32" },
  // int listen(int sockfd, int backlog);
  listen: { parameters: ["i32", "i32"], result: "i32" },
  // int accept(int sockfd, struct sockaddr *addr, socklen_t *addrlen);
  accept: { parameters: ["i32", "pointer", "pointer"], result: "i32" },
  // int getifaddrs(struct ifaddrs **ifap);
  getifaddrs: { parameters: ["buffer"], result: "i32" },
  // void freeifaddrs(struct ifaddrs *ifa);
  freeifaddrs: { parameters: ["pointer"], result: "void" },
  // unsigned int if_nametoindex(const char *ifname);
  if_nametoindex: { parameters: ["buffer"], result: "u32" },
  // char *getenv(const char *name);
  getenv: { parameters: ["buffer"], result: "pointer" },
  // char *strerror(int errnum);
  strerror: { parameters: ["i32"], result: "pointer" },
});

const MANY = 100;

/** This thread's errno. */
let errno: Deno.UnsafePointerView | undefined;

/**
 * Functions that are opened together, when one of them is first called.
 *
 * Deno compiles a trampoline for each symbol that is opened as a function: 3 ms for these tables,
 * 4 % of a plain run. So they are opened as addresses at first; a process that calls them many
 * times gets the trampolines, which save 2.5 µs a call and a tenth of the time of a series.
 */
function table<const T extends Table>(functions: T): () => Functions<T> {
  let opened: Functions<T> | undefined, uses = 0;
  return () => {
    if (++uses === MANY) opened = open(LIBC, functions, true);
    if (opened === undefined) {
      opened = open(LIBC, functions);
      errno ??= new Deno.UnsafePointerView(hot().__errno_location()!);
    }
    return opened;
  };
}

/**
 * Opens functions of a library, as addresses or compiled.
 *
 * @throws {CannotRunError} not Linux, or no such library or function
 * @throws {Deno.errors.NotCapable} `--allow-ffi` is missing
 */
export function open<T extends Table>(
  library: string,
  functions: T,
  isCompiled = false,
): Functions<T> {
  if (Deno.build.os !== "linux") {
    throw new CannotRunError(`this needs Linux, and here is ${Deno.build.os}`);
  }
  try {
    if (isCompiled) return Deno.dlopen(library, functions).symbols as unknown as Functions<T>;
    const statics: Record<string, { type: "pointer" }> = {};
    for (const name in functions) statics[name] = { type: "pointer" };
    const { symbols } = Deno.dlopen(library, statics);
    const callable: Record<string, unknown> = {};
    for (const name in functions) {
      // The "value" of a symbol that is a pointer is the symbol's address.
      const address = symbols[name] as Deno.PointerObject<Deno.ForeignFunction>;
      const pointer = new Deno.UnsafeFnPointer(address, functions[name] as Deno.ForeignFunction);
      callable[name] = pointer.call.bind(pointer);
    }
    return callable as Functions<T>;
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) throw error;
    throw new CannotRunError(`cannot open ${library}, the GNU C library`, { cause: error });
  }
}

/**
 * The result of a call, or the negated errno in place of −1. Must be the first call after it.
 *
 * V8 may still come between: once in a process, when a thread first waits for one of its locks, it
 * looks for a file in /sys that is seldom there, and errno is ENOENT (this thread's in 1 of 4,000
 * runs on a busy machine). So what is done next depends on the socket, not on errno alone.
 */
function orNegativeErrno(result: number | bigint): number {
  return result >= 0 ? Number(result) : -errno!.getInt32();
}

/** The value of a variable of the environment, getenv(3); `null` if it is not set. */
export function getenv(name: string): string | null {
  const value = cold().getenv(new TextEncoder().encode(`${name}\0`));
  return value === null ? null : new Deno.UnsafePointerView(value).getCString();
}

/** The words for an error number, strerror(3). */
export function strerror(number: number): string {
  return new Deno.UnsafePointerView(cold().strerror(number)!).getCString();
}

// ─── Sockets ────────────────────────────────────────────────────────────────────────────────────

type Bytes = Uint8Array<ArrayBuffer>;

// Reused by every call: the wrappers are synchronous, so no two are ever inside one.
const length = new Uint32Array(1);

/** getsockname(2) into `address`. */
export function getsockname(fd: number, address: Bytes): number {
  length[0] = address.length;
  return orNegativeErrno(hot().getsockname(fd, address, length));
}

/** getpeername(2) into `address`. */
export function getpeername(fd: number, address: Bytes): number {
  length[0] = address.length;
  return orNegativeErrno(hot().getpeername(fd, address, length));
}

/** getsockopt(2) into `value`. @returns how many bytes the option has, at most as many as fit */
export function getsockopt(
  fd: number,
  { level, option }: SocketOption,
  value: BufferSource & { byteLength: number },
): number {
  length[0] = value.byteLength;
  const result = orNegativeErrno(hot().getsockopt(fd, level, option, value, length));
  return result < 0 ? result : length[0];
}

/** setsockopt(2) of one `int`, or of a structure of several. */
export function setsockopt(
  fd: number,
  { level, option }: SocketOption,
  value: Int32Array<ArrayBuffer>,
): number {
  return orNegativeErrno(hot().setsockopt(fd, level, option, value, value.byteLength));
}

/** recv(2) into `buffer`. */
export function recv(fd: number, buffer: Uint8Array, flags: number): number {
  return orNegativeErrno(hot().recv(fd, buffer as Bytes, BigInt(buffer.length), flags));
}

/** send(2). */
export function send(fd: number, bytes: Uint8Array, flags: number): number {
  return orNegativeErrno(cold().send(fd, bytes as Bytes, BigInt(bytes.length), flags));
}

/** socket(2), a TCP socket unless told otherwise; non-blocking and closed on exec. */
export function socket(family: number, type = SOCK_STREAM, protocol = IPPROTO_TCP): number {
  const SOCK_NONBLOCK = 0x800, SOCK_CLOEXEC = 0x80000;
  return orNegativeErrno(hot().socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, protocol));
}

/** bind(2). */
export function bind(fd: number, address: Bytes): number {
  return orNegativeErrno(hot().bind(fd, address, address.length));
}

/** listen(2) for a single connection. */
export function listen(fd: number): number {
  return orNegativeErrno(cold().listen(fd, 1));
}

/** accept(2). */
export function accept(fd: number): number {
  return orNegativeErrno(cold().accept(fd, null, null));
}

/** connect(2) of a non-blocking socket: `-EINPROGRESS`, unless it fails at once. */
export function connect(fd: number, address: Bytes): number {
  return orNegativeErrno(hot().connect(fd, address, address.length));
}

/** poll(2) that does not wait. @param polled `struct pollfd { int fd; short events, revents; }` */
export function poll(polled: Int32Array<ArrayBuffer>): number {
  return orNegativeErrno(cold().poll(polled, BigInt(polled.length / 2), 0));
}

/** shutdown(2) of both directions. */
export function shutdown(fd: number): number {
  const SHUT_RDWR = 2;
  return orNegativeErrno(cold().shutdown(fd, SHUT_RDWR));
}

/**
 * recvmsg(2).
 *
 * @param message a `struct msghdr` at the start of a block that also holds what it points to
 */
export function recvmsg(fd: number, message: Bytes, flags: number): number {
  return orNegativeErrno(cold().recvmsg(fd, message, flags));
}

/** The index of a network interface by its name, if_nametoindex(3); 0 if there is none. */
export function if_nametoindex(name: string): number {
  return cold().if_nametoindex(new TextEncoder().encode(`${name}\0`));
}

/** getifaddrs(3). @param list gets the address of the first entry, for {@linkcode freeifaddrs} */
export function getifaddrs(list: BigUint64Array<ArrayBuffer>): number {
  return orNegativeErrno(cold().getifaddrs(list));
}

/** freeifaddrs(3). */
export function freeifaddrs(list: Deno.PointerValue): void {
  cold().freeifaddrs(list);
}

// ─── Descriptors ────────────────────────────────────────────────────────────────────────────────

/** close(2). */
export function close(fd: number): number {
  return orNegativeErrno(hot().close(fd));
}

/** The size of the descriptor table, which no descriptor reaches, getdtablesize(3). */
export function getdtablesize(): number {
  return cold().getdtablesize();
}

/** fcntl(2) of a command that takes an `int`. */
export function fcntl(fd: number, command: number, argument: number): number {
  return orNegativeErrno(cold().fcntl(fd, command, argument));
}

// ─── Waiting ────────────────────────────────────────────────────────────────────────────────────

/** An epoll instance, closed on exec, epoll_create1(2). */
export function epoll_create1(): number {
  const EPOLL_CLOEXEC = 0x80000;
  return orNegativeErrno(cold().epoll_create1(EPOLL_CLOEXEC));
}

/** epoll_ctl(2). */
export function epoll_ctl(epoll: number, operation: number, fd: number, event: Bytes): number {
  return orNegativeErrno(cold().epoll_ctl(epoll, operation, fd, event));
}

/**
 * epoll_wait(2) without a time limit, in another thread.
 *
 * @param events must stay referenced until the call returns: the thread writes to it
 * @returns how many events; -1 after an error, whose number stays in that thread
 */
export function epoll_wait(epoll: number, events: Bytes, most: number): Promise<number> {
  return cold().epoll_wait(epoll, events, most, -1);
}

/** A counter to wake an epoll instance with, closed on exec, eventfd(2). */
export function eventfd(): number {
  const EFD_CLOEXEC = 0x80000, EFD_NONBLOCK = 0x800;
  return orNegativeErrno(hot().eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

/** Adds 1 to an eventfd's counter, eventfd_write(3). */
export function eventfd_write(fd: number): number {
  return orNegativeErrno(cold().eventfd_write(fd, 1n));
}
