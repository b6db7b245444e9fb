/**
 * A scene by hand: the commands that built its network, and what to look at and to try in it, as a
 * text that a root shell takes as it is.
 *
 * @module
 */

import { missing } from "../support/processes.ts";
import type { Scene } from "./scene.ts";
import { inNamespace } from "./site.ts";

/** The first line of the text. What follows it, up to an empty line, builds the network. */
export const BUILT = "# What has built it, as root";

/** The prefix of namespaces unless another one is given. */
export const DEFAULT_PREFIX = "lab";

/** Writes what a person may type in a network that stands, `PREFIX-HOST` being its namespaces. */
export function byHand(
  { name, looks, tries }: Scene,
  built: readonly string[],
  prefix: string,
): string {
  const deno = missing(["deno"]).length === 0 ? "deno" : Deno.execPath();
  const [script, traffic, lab] = ["../../main.ts", "traffic.ts", "lab.ts"].map((path) =>
    new URL(path, import.meta.url).pathname
  );
  const inside = (commands: Scene["looks"]) =>
    commands.map(([host, line]) => inNamespace(`${prefix}-${host}`, line));
  const named = prefix === DEFAULT_PREFIX ? "" : ` --name ${prefix}`;
  return [
    BUILT,
    ...built,
    "",
    "# To look, in another terminal, while there is traffic",
    ...inside(looks),
    "",
    "# To try",
    `get='${deno} run --allow-net --allow-ffi ${script}'`,
    `traffic='${deno} run --allow-all ${traffic}'`,
    ...inside(tries),
    "",
    "# To measure again, after a change, once your own programs in it have ended",
    `lab='${deno} run --allow-all ${lab}'`,
    `$lab --scene ${name} --again${named}`,
    "",
    "# To remove it, and end what runs in it",
    `$lab --remove${named}`,
    "",
  ].join("\n");
}
