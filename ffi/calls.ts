/**
 * Calls of libc whose negated error number becomes an error: a {@linkcode LibcError}, which names
 * the call, or the one that Deno throws in the same case.
 *
 * @module
 */

import * as libc from "./libc.ts";

/** A libc call failed. */
export class LibcError extends Error {
  /**
   * Describes the failure of one call.
   *
   * @param call the call as its man page writes it, such as `setsockopt(IP_TOS)`
   * @param errno the error number, errno(3)
   */
  constructor(readonly call: string, readonly errno: number) {
    super(`${call}: ${libc.strerror(errno)} (errno ${errno})`);
    this.name = "LibcError";
  }
}

/** Returns the result of a call. @throws {LibcError} it is a negated error number */
export function orLibcError(call: string, result: number): number {
  if (result < 0) throw new LibcError(call, -result);
  return result;
}

/** Returns the result of a call. @throws {Error} as Deno does, if it is a negated error number */
export function orDenoError(result: number): number {
  if (result < 0) throw denoError(-result);
  return result;
}

/** The error that Deno throws for an error number, of the class `Other` if it knows none. */
export function denoError(errno: number, Other: new (message: string) => Error = Error): Error {
  const { BrokenPipe, ConnectionRefused, ConnectionReset, TimedOut } = Deno.errors;
  const classes: Record<number, new (message: string) => Error> = {
    [libc.ECONNREFUSED]: ConnectionRefused,
    [libc.ECONNRESET]: ConnectionReset,
    [libc.EPIPE]: BrokenPipe,
    [libc.ETIMEDOUT]: TimedOut,
  };
  return new (classes[errno] ?? Other)(`${libc.strerror(errno)} (os error ${errno})`);
}

/** The error of a lost connection; a reset if `errno` is none that a loss can have. */
export function lossError(errno: number): Error {
  const { EPIPE, ENETUNREACH, ETIMEDOUT, EHOSTUNREACH } = libc;
  const isPossible = [EPIPE, ENETUNREACH, ETIMEDOUT, EHOSTUNREACH].includes(errno);
  return denoError(isPossible ? errno : libc.ECONNRESET, Deno.errors.ConnectionReset);
}

/** How Deno begins what it says of a server's certificate; `secure.ts` does as well. */
export const BAD_CERTIFICATE = "invalid peer certificate: ";

// ─── Socket options, getsockopt(2) and setsockopt(2) ────────────────────────────────────────────

// Reused by every call: the functions are synchronous, so no two are ever inside one.
const int = new Int32Array(1);

/** An option that is an `int`. @throws {LibcError} the kernel refuses */
export function getOption(fd: number, option: libc.SocketOption): number {
  const result = libc.getsockopt(fd, option, int);
  if (result < 0) throw new LibcError(`getsockopt(${option.name})`, -result);
  return int[0];
}

/** Sets an option that is an `int`. @throws {LibcError} the kernel refuses */
export function setOption(fd: number, option: libc.SocketOption, value: number): void {
  int[0] = value;
  const result = libc.setsockopt(fd, option, int);
  if (result < 0) throw new LibcError(`setsockopt(${option.name})`, -result);
}

const structure = new Uint8Array(256);

/**
 * The bytes of an option that is a structure, at most 256; none if the kernel refuses. They are
 * good until the next call: memory of their own costs a busy server 5 % of its replies.
 */
export function getOptionBytes(fd: number, option: libc.SocketOption): Uint8Array<ArrayBuffer> {
  return structure.subarray(0, Math.max(0, libc.getsockopt(fd, option, structure)));
}

/**
 * Makes writes to a descriptor wait for room instead of failing, fcntl(2).
 *
 * @throws {LibcError} the descriptor is not open
 */
export function makeBlocking(fd: number): void {
  const F_GETFL = 3, F_SETFL = 4, O_NONBLOCK = 0x800;
  const flags = orLibcError("fcntl(F_GETFL)", libc.fcntl(fd, F_GETFL, 0));
  if ((flags & O_NONBLOCK) === 0) return;
  orLibcError("fcntl(F_SETFL)", libc.fcntl(fd, F_SETFL, flags & ~O_NONBLOCK));
}
