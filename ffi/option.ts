/**
 * Socket options as values: getsockopt(2) and setsockopt(2) with typed errors.
 *
 * @module
 */

import { orLibcError } from "./errors.ts";
import * as libc from "./libc.ts";

// Reused by every call: the functions are synchronous, so no two are ever inside one.
const int = new Int32Array(1);

/** An option that is an `int`. @throws {LibcError} the kernel refuses */
export function getOption(fd: number, option: libc.SocketOption): number {
  orLibcError(`getsockopt(${option.name})`, libc.getsockopt(fd, option, int));
  return int[0];
}

/** Sets an option that is an `int`. @throws {LibcError} the kernel refuses */
export function setOption(fd: number, option: libc.SocketOption, value: number): void {
  int[0] = value;
  setOptionInts(fd, option, int);
}

/** Sets an option that is a structure of `int`s. @throws {LibcError} the kernel refuses */
export function setOptionInts(
  fd: number,
  option: libc.SocketOption,
  ints: Int32Array<ArrayBuffer>,
): void {
  orLibcError(`setsockopt(${option.name})`, libc.setsockopt(fd, option, ints));
}

/** The bytes of an option that is a structure, at most `size`; none if the kernel refuses. */
export function getOptionBytes(
  fd: number,
  option: libc.SocketOption,
  size: number,
): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(size);
  return bytes.subarray(0, Math.max(0, libc.getsockopt(fd, option, bytes)));
}
