/**
 * The page of the lab: scenes and what was measured in them, in HTML that needs no script and no
 * other file.
 *
 * @module
 */

import { drawSvg, escape } from "./plot.ts";
import type { Scene, Shown } from "./scene.ts";
import type { Command } from "./site.ts";

/** The words of the lab. Each is explained by words that are not in the list, or are above it. */
const WORDS: readonly (readonly [word: string, meaning: string])[] = [
  [
    "ToS byte",
    "the second byte of an IPv4 header; IPv6 calls it Traffic Class. Its upper six bits " +
    "are the DSCP, its lower two are ECN, by which routers signal congestion.",
  ],
  [
    "DSCP",
    "Differentiated Services Code Point, 0 to 63: how a packet asks to be treated. Here it " +
    "is called the mark.",
  ],
  ["DF", "Default Forwarding, DSCP 0: no mark, and no special treatment."],
  ["EF", "Expedited Forwarding, DSCP 46, ToS byte 0xB8: for voice and video, to be sent soon."],
  [
    "CS1, AF41 …",
    "other marks: Class Selectors (CS0 to CS7) and Assured Forwarding (AF11 to AF43).",
  ],
  ["queue", "where packets wait that a link cannot send yet. If it is full, packets are dropped."],
  ["bottleneck", "the slowest link of a path: the queue is in front of it."],
  ["bulk flow", "a connection that sends as fast as it can, such as a download. It fills queues."],
  [
    "SYN, handshake",
    "the packets that open a TCP connection; the SYN is the first. A program that " +
    "marks a connection once it is open sends them unmarked; the script's option --mark-syn marks " +
    "them too.",
  ],
  ["GET", "one HTTP request and its reply, on a connection of its own."],
  ["median", "half of the values are smaller, half are greater."],
  ["NAT", "Network Address Translation: a router puts its own address in place of a client's."],
  ["hop", "a router on a path, or its end, counted from the client."],
];

/** The commands of a scene, ready to be copied, under comments with their hosts. */
export function commandsText(commands: readonly Command[]): string {
  return commands.map(([host, line], at) =>
    `${commands[at - 1]?.[0] === host ? "" : `# on ${host}\n`}${line}\n`
  ).join("");
}

/** Writes a page with scenes and what was measured in them. */
export function page(played: readonly { scene: Scene; shown: Shown }[]): string {
  const sections = played.map(({ scene, shown }) =>
    `<section id="${scene.name}">
<h2>${scene.name}</h2>
<p>${escape(scene.concept)}</p>
<pre>${escape(commandsText(scene.commands))}</pre>
${drawSvg(shown.picture)}<pre>${escape(shown.table)}</pre>
<p class="said">${
      escape(shown.sentences.join(" ")).replace(/(\d) (?=(?:ms|s|kB)\b)/g, "$1\u00a0")
    }</p>
</section>
`
  );
  const links = played.map(({ scene: { name } }) => `<a href="#${name}">${name}</a>`).join(" · ");
  const words = WORDS.map(([word, meaning]) =>
    `<dt>${escape(word)}</dt><dd>${escape(meaning)}</dd>\n`
  );
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>QoS, measured</title>
<style>
  :root { color-scheme: light dark }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 0 auto; padding: 1rem }
  section { border-top: 1px solid #8888; margin-top: 2rem }
  pre { font-size: 13px; line-height: 1.35; overflow-x: auto; padding: .75rem; background: #8882; border-radius: 6px }
  svg { display: block; box-sizing: border-box; width: 100%; height: auto; border: 1px solid #8884; border-radius: 6px }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem }
  dt { font-weight: 600 } dd { margin: 0 }
  .said { font-weight: 600 }
</style>
</head>
<body>
<h1>QoS, measured</h1>
<p>Networks in namespaces on one machine, and what marks, queues and limits do in them.</p>
<p>${links}</p>
<section id="words">
<h2>Words</h2>
<dl>
${words.join("")}</dl>
</section>
${sections.join("")}</body>
</html>
`;
}
