/**
 * Marking alone and proof alone, each time on a new connection. `deno task bench` runs these and shows
 * their times.
 *
 * @module
 */

import { drainSent, setTos, watchSent } from "../ffi/mod.ts";

const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
const open: Deno.Listener[] = [];

/** Measures `work` on a new connection in a process with `sockets` other open sockets. */
function onFresh(
  name: string,
  sockets: number,
  prepare: (conn: Deno.TcpConn) => Promise<unknown> | void,
  work: (conn: Deno.TcpConn) => unknown,
): void {
  Deno.bench(name, { n: 3000, warmup: 500 }, async (bench) => {
    while (open.length < sockets) open.push(Deno.listen({ hostname: "127.0.0.1", port: 0 }));
    while (open.length > sockets) open.pop()!.close();
    const [conn, other] = await Promise.all([
      Deno.connect({ hostname: "127.0.0.1", port: listener.addr.port }),
      listener.accept(),
    ]);
    await prepare(conn);
    bench.start();
    work(conn);
    bench.end();
    conn.close();
    other.close();
  });
}

for (const sockets of [20, 1000, 10_000]) {
  const name = `marking alone, ${sockets.toLocaleString("en")} sockets`;
  onFresh(name, sockets, () => {}, (conn) => setTos(conn, 0xb8));
}

onFresh("proof alone, enable", 20, (conn) => void setTos(conn, 0xb8), watchSent);

const sent = (conn: Deno.TcpConn) => {
  watchSent(conn);
  return conn.write(new Uint8Array(100));
};
onFresh("proof alone, drain and parse", 20, sent, (conn) => {
  if (drainSent(conn).length !== 1) throw new Error("no packet");
});
