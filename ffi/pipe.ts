/**
 * Prepares a descriptor, such as standard output, for writes.
 *
 * @module
 */

import { orLibcError } from "./errors.ts";
import * as libc from "./libc.ts";

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
