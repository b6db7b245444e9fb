/**
 * Mark the packets of a TCP connection with a DSCP, and prove that they carry it; for Linux.
 *
 * Needs `--allow-ffi`, besides `--allow-net` for the connection itself.
 *
 * ```ts
 * import { fdOf, setTos, drainSent, watchSent } from "./mod.ts";
 *
 * const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
 * const conn = await Deno.connect({ port: (listener.addr as Deno.NetAddr).port });
 * const fd = fdOf(conn);
 * setTos(conn, 0xB8); // Expedited Forwarding, from here on
 * watchSent(conn);
 * await conn.write(new TextEncoder().encode("hello"));
 * console.log(`descriptor ${fd} sent`, drainSent(conn)[0].tos); // 184
 * conn.close();
 * listener.close();
 * ```
 *
 * @module
 */

// Pure, no system calls: dscp.ts, sockaddr.ts, icmp.ts. Deno's own APIs only: deno.ts. All others
// call libc, by way of libc.ts.

import type { DialedConn, DialOptions } from "./dial.ts";

export { arrivedFrom, keepArrivals, readArrived, watchArriving } from "./arrived.ts";
export type { Arrived, ArrivedClient } from "./arrived.ts";
export { type ConnectOptions, MarkedConn } from "./conn.ts";
export type { DialedConn, DialOptions } from "./dial.ts";
export { describe, hex, type Mark, markOf, nameOf, sameDscp } from "./dscp.ts";
export { parseDscp, parseIpTos, parseTos } from "./dscp.ts";
export { LibcError } from "./calls.ts";
export { DescriptorError, fdOf } from "./fd.ts";
export type { Connection, Handshake, Listening, Socket } from "./fd.ts";
export { CannotRunError } from "./libc.ts";
export { getTos, MarkError, ReflectedTosError, setTos } from "./mark.ts";
export type { Hop } from "./probe.ts";
export type { DialedTlsConn, Transport, Trust } from "./secure.ts";
export { drainSent, type SentPacket, watchSent } from "./sent.ts";
export { formatAddress } from "./sockaddr.ts";

/**
 * Connects with the mark already set, so that the SYN carries it too: `dial` of `ffi/dial.ts`,
 * loaded at the first use.
 */
export async function dial(options: DialOptions): Promise<DialedConn> {
  return await (await import("./dial.ts")).dial(options);
}
