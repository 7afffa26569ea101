// Exits 0 when node_modules is what package-lock.json says and its native parts load into this Node.
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';

const require = createRequire(import.meta.url);
const root = new URL('../../', import.meta.url);

async function readPackages(file) {
  return JSON.parse(await readFile(new URL(file, root), 'utf8')).packages;
}

function fail(reason) {
  console.log(`npm packages: ${reason}`);
  process.exit(1);
}

const wanted = await readPackages('package-lock.json');
// npm writes down here what it installed.
const installed = await readPackages('node_modules/.package-lock.json').catch(() =>
  fail('nothing is installed'),
);
for (const [place, { version, link, optional }] of Object.entries(wanted)) {
  if (!place.startsWith('node_modules/') || link) continue;
  const found = installed[place];
  // Optional packages for other platforms are left out by npm.
  if (found === undefined && optional) continue;
  if (found?.version !== version) fail(`${place} is ${found?.version ?? 'missing'}, not ${version}`);
}
try {
  const Database = require('better-sqlite3');
  new Database(':memory:').close();
} catch (error) {
  fail(`better-sqlite3 does not load: ${error.message}`);
}
