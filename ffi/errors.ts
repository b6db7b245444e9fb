/**
 * What a negated error number becomes: a {@linkcode LibcError}, which names the call, or the error
 * that Deno throws in the same case.
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
