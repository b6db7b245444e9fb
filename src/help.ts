/**
 * The text of `--help`, which fits any terminal from 40 columns up.
 *
 * @module
 */

import { OPTIONS } from "./options.ts";
import { DEFAULT_HOST, DEFAULT_PORT, VERSION } from "./target.ts";
import { printable, wrap } from "./text.ts";

/** How this program was started: by a URL, from a checkout, or as an installed command. */
function commandLine(meta: ImportMeta): string {
  const run = "deno run --allow-net --allow-ffi";
  if (!meta.url.startsWith("file:")) return `${run} ${printable(meta.url)}`;
  try {
    // The package's own name resolves if its deno.json is in use; an installed command has another.
    meta.resolve("@dscp-get/dscp-get");
    return `${run} main.ts`;
  } catch {
    return "dscp-get";
  }
}

/** The text of `--help`, in lines of at most `width` columns. @param meta that of `main.ts` */
export function usage(width: number, meta: ImportMeta): string {
  const indent = " ".repeat(width < 72 ? 8 : 26);
  const filled = (text: string) =>
    wrap(text, width - indent.length).replace(/^/gm, indent).trimEnd();
  const groups = Object.entries(OPTIONS).map(([title, options]) => {
    const rows = Object.entries(options).map(([label, [help]]) => {
      const start = `  ${label}`.padEnd(indent.length);
      const isAlone = start.length > indent.length;
      return `${start}${isAlone ? "\n" + filled(help) : filled(help).slice(indent.length)}\n`;
    });
    return `${title}\n${rows.join("")}`;
  });
  const intro = [
    `dscp-get ${VERSION}: send one HTTP GET whose packets carry a DSCP mark, and prove it`,
    `  ${commandLine(meta)} [options] [URL]`,
    `Without a URL it asks http://${DEFAULT_HOST}:${DEFAULT_PORT}/, and answers the request itself \
if nothing is listening there. The reply's body goes to standard output, the report to standard \
error.`,
  ];
  const codes =
    `Exit codes: 0 done, 2 bad usage; as curl: 3 bad URL, 6 host not found, 7 cannot connect or \
listen, 8 bad reply, 18 ended early, 22 HTTP error with -f, 23 cannot write, 28 timeout, 35 TLS \
failed, 52 empty reply, 56 connection lost, 60 bad certificate, 77 bad --cacert file; \
100 the kernel did not accept the mark, 101 packets left with another mark, 102 packets arrived \
with another mark, at the server or at a router, 103 cannot run here (not Linux, or a permission \
or libc missing), 104 not proved with --require-proof.`;
  return [...intro.map((text) => wrap(text, width)), ...groups, wrap(codes, width)].join("\n");
}
