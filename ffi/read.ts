/**
 * Reads what has come on a connection without leaving it to the event loop.
 *
 * @module
 */

import { type Connection, connectionOf } from "./fd.ts";
import { isReadable, receive } from "./libc.ts";

/**
 * Reads from a connection without TLS, as its own `read` does, but at once or after a while that is spent awake: falling
 * asleep and being woken takes longer than a reply from nearby, and adds to its time.
 *
 * @param patience milliseconds to look for something, in which nothing else runs
 * @returns the number of bytes, 0 at the end of the connection; `null` where none have come, or the connection is lost
 * @throws {DescriptorError} the connection is closed
 */
export function readSoon(
  connection: Connection,
  buffer: Uint8Array,
  patience: number = 0,
): number | null {
  const { fd } = connectionOf(connection);
  // A lost connection is not readable: it tells why once, and that is for the `read` of whoever opened it.
  for (const until = performance.now() + patience; !isReadable(fd);) {
    if (performance.now() >= until) return null;
  }
  const size = receive(fd, buffer);
  return size < 0 ? null : size;
}
