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

export { describe, hex, type Mark, markOf, nameOf, parseDscp, parseTos, sameDscp } from "./dscp.ts";
export { type Connection, DescriptorError, fdOf, type Listening } from "./fd.ts";
export { CannotRunError, LibcError } from "./libc.ts";
export { getTos, MarkError, setTos } from "./mark.ts";
export { type SentPacket, takeSent, watchSent } from "./sent.ts";
export { endText } from "./sockaddr.ts";
