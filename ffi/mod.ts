/**
 * Mark the packets of a TCP connection with a DSCP, and prove that they carry it; for Linux.
 *
 * Needs `--allow-ffi`, besides `--allow-net` for the connection itself.
 *
 * ```ts
 * import { fdOf, setTos, takeSent, watchSent } from "./mod.ts";
 *
 * const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
 * const conn = await Deno.connect({ port: (listener.addr as Deno.NetAddr).port });
 * const fd = fdOf(conn);
 * setTos(conn, 0xB8); // Expedited Forwarding, from here on
 * watchSent(conn);
 * await conn.write(new TextEncoder().encode("hello"));
 * console.log(`descriptor ${fd} sent`, takeSent(conn)); // [{ tos: 184, length: 57 }]
 * conn.close();
 * listener.close();
 * ```
 *
 * @module
 */

import type { Dialed, DialOptions } from "./dial.ts";

export { type Arrived, keepArrivals, takeArrived, watchArriving } from "./arrived.ts";
export type { Dialed, DialOptions } from "./dial.ts";
export { describe, hex, type Mark, markOf, nameOf, parseDscp, parseTos, sameDscp } from "./dscp.ts";
export { type Connection, DescriptorError, fdOf, type Listening } from "./fd.ts";
export { CannotRunError, LibcError, setBlocking } from "./libc.ts";
export { getTos, MarkError, setTos } from "./mark.ts";
export type { Secured } from "./secure.ts";
export { markAndWatch, type SentPacket, takeSent, watchSent } from "./sent.ts";
export { endText } from "./sockaddr.ts";

// A plain run connects by Deno alone, so dial.ts is loaded when it is used.

/** Connects with the mark already set, so that the SYN carries it too: `dial` of `ffi/dial.ts`. */
export async function dial(options: DialOptions): Promise<Dialed> {
  return await (await import("./dial.ts")).dial(options);
}

/** Loads what {@linkcode dial} needs, so that the first call takes no longer than the next. */
export async function prepareDial(): Promise<void> {
  await import("./dial.ts");
}

/** The addresses of a host by the system's own resolver, IPv6 first: `resolve` of `ffi/dial.ts`. */
export async function resolve(
  hostname: string,
  family: 4 | 6 | null = null,
  signal?: AbortSignal,
): Promise<string[]> {
  return await (await import("./dial.ts")).resolve(hostname, family, signal);
}
