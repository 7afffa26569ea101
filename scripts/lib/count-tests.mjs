// Adds up what scripts/test ran: every stage is one test, and vitest's own are added. Names what failed, prints
// `N passed, N failed` as the last line, and exits 0 only when something passed and nothing failed.
import { readFileSync, readdirSync } from 'node:fs';
import path from 'node:path';

const directory = process.argv[2];
let passed = 0;
let failed = 0;

function count(isPassed, name) {
  if (isPassed) passed += 1;
  else {
    failed += 1;
    console.log(`failed: ${name}`);
  }
}

for (const file of readdirSync(directory).sort()) {
  const full = path.join(directory, file);
  if (file.endsWith('.status')) {
    count(readFileSync(full, 'utf8').trim() === '0', `stage ${path.basename(file, '.status')}`);
  } else if (file.endsWith('.json')) {
    for (const suite of JSON.parse(readFileSync(full, 'utf8')).testResults) {
      const place = path.relative(process.cwd(), suite.name);
      const hasFailedTest = suite.assertionResults.some((test) => test.status === 'failed');
      // A file that cannot be loaded has no tests, and one can fail after its tests; both are failures all the same.
      if (suite.assertionResults.length === 0) count(false, `${place}: no test ran`);
      else if (suite.status === 'failed' && !hasFailedTest)
        count(false, `${place}: before or after its tests`);
      for (const test of suite.assertionResults) {
        const note = test.status === 'failed' ? '' : ` (${test.status})`;
        count(test.status === 'passed', `${place}: ${test.fullName}${note}`);
      }
    }
  }
}
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed === 0 && passed > 0 ? 0 : 1;
