// Records which sources the page was built from, so that a test can tell a stale build.
// tests/page/test_build.py computes the same digest.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join, relative, sep } from "node:path";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL(".", import.meta.url));
const skipped = new Set(["node_modules", "README.md"]);

function* files(folder) {
  for (const name of readdirSync(folder)) {
    if (skipped.has(name) || name.startsWith(".")) continue;
    const path = join(folder, name);
    if (statSync(path).isDirectory()) yield* files(path);
    else yield relative(root, path).split(sep).join("/");
  }
}

const digest = createHash("sha256");
for (const name of [...files(root)].sort()) {
  const content = createHash("sha256").update(readFileSync(join(root, name))).digest("hex");
  digest.update(`${name} ${content}\n`);
}
const out = join(root, "../src/kvist/server/static/build.json");
writeFileSync(out, `${JSON.stringify({ sources: digest.digest("hex") })}\n`);
