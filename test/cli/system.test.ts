import { chmod, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { startCliFixture, type CliFixture } from './fixture.js';

let cli: CliFixture;
beforeAll(async () => {
  cli = await startCliFixture();
});
beforeEach(() => {
  cli.api.engine.reset();
});
afterAll(async () => {
  await cli[Symbol.asyncDispose]();
});

describe('system', () => {
  test('health needs no token and tells trouble by its exit code', async () => {
    const well = await cli.run(['health', '--token-file', '/nonexistent']);
    expect(well.code).toBe(0);
    cli.api.engine.components[0]!.isHealthy = false;
    const ill = await cli.run(['health', '--json']);
    expect(ill.code).toBe(1);
    expect(ill.json).toMatchObject({ isHealthy: false });
  });

  test('doctor fails only for what is needed', async () => {
    cli.api.engine.findings.push({
      name: 'KVM',
      isOk: false,
      isRequired: false,
      found: 'absent',
      remedy: 'Enable it.',
    });
    expect((await cli.run(['doctor'])).code).toBe(0);
    cli.api.engine.findings[0]!.isOk = false;
    const result = await cli.run(['doctor']);
    expect(result.code).toBe(1);
    expect(result.stdout).toMatch(/^qemu-img\s+MISSING/m);
  });

  test('config show reads the files itself and masks passwords', async () => {
    const file = path.join(cli.directory, 'holdfast.yaml');
    await writeFile(file, 'redis: { kind: given, url: "redis://u:hunter2@h:1/0" }\n');
    const table = await cli.run(['config', 'show', '--config', file], {
      env: { HOLDFAST_URL: 'http://x:1' },
    });
    expect(table.stderr).toBe('');
    expect(table.stdout).toMatch(/^redis\.kind\s+given/m);
    expect(table.stdout).not.toContain('hunter2');
    const json = await cli.run(['config', 'show', '--config', file, '--json']);
    expect((json.json as { items: unknown[] }).items.length).toBeGreaterThan(20);
    expect(json.stdout).not.toContain('hunter2');
    expect((await cli.run(['config', 'show', '--config', '/nonexistent'])).code).toBe(2);
  });
});

describe('connection and token', () => {
  test('a daemon that is not there: 3, with what to do', async () => {
    const result = await cli.run(['vm', 'list', '--url', 'http://127.0.0.1:1']);
    expect(result.code).toBe(3);
    expect(result.stderr).toContain('http://127.0.0.1:1');
    expect(result.stderr).toContain('systemctl status holdfastd');
  });

  test('a wrong token: 4; a file that is missing, empty or many lines: 4, its content never shown', async () => {
    const file = path.join(cli.directory, 'wrong');
    for (const content of ['wrong-token-text', '', 'first-line\nsecond-line']) {
      await writeFile(file, content, { mode: 0o600 });
      const result = await cli.run(['vm', 'list', '--token-file', file]);
      expect(result.code).toBe(4);
      expect(result.stderr).toContain('UNAUTHENTICATED');
      for (const line of content.split('\n').filter((part) => part !== '')) {
        expect(result.stdout + result.stderr).not.toContain(line);
      }
    }
    expect((await cli.run(['vm', 'list', '--token-file', '/nonexistent'])).code).toBe(4);
  });

  test('a token file that others can read is warned about', async () => {
    await chmod(cli.tokenFile, 0o644);
    const result = await cli.run(['vm', 'list']);
    await chmod(cli.tokenFile, 0o600);
    expect(result.code).toBe(0);
    expect(result.stderr).toContain('can be read by others');
  });

  test.each(['ftp://x', 'x', 'http://u:p@127.0.0.1:8007'])('--url %s is wrong usage', async (url) => {
    const result = await cli.run(['vm', 'list', '--url', url]);
    expect(result.code).toBe(2);
  });

  test('an address that is no Holdfast is told apart', async () => {
    const result = await cli.run(['health', '--url', `${cli.api.server.url}/elsewhere`]);
    expect(result.code).toBe(1);
  });

  test('there is no option for the text of a token', async () => {
    for (const args of [
      ['--token', 'x', 'vm', 'list'],
      ['vm', 'list', '--token', 'x'],
    ]) {
      expect((await cli.run(args)).code).toBe(2);
    }
  });

  test('help and wrong usage', async () => {
    const help = await cli.run(['--help']);
    expect(help.code).toBe(0);
    expect(help.stdout).toContain('Exit codes: 0 done');
    expect((await cli.run(['nonsense'])).code).toBe(2);
    expect((await cli.run([])).code).toBe(2);
    expect((await cli.run(['run', 'show', 'x'])).code).toBe(2);
  });
});
