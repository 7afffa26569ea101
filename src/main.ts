import { Command } from 'commander';
import { startApp } from './app.js';
import { DEFAULT_CONFIG_FILE, loadConfig, ROLES } from './config/index.js';
import { reportFailure, waitForSignal } from './lib/entry-point.js';
import { createLogger } from './lib/log.js';

/** Documented in docs/reference/cli.md. */
const EXIT_FAILED = 1;
const EXIT_CONFIG = 2;

const program = new Command('holdfastd')
  .description('Backup and restore appliance for virtual-machine disks: API, scheduler and workers')
  .option('--config <file>', `configuration file (default: ${DEFAULT_CONFIG_FILE} if it is there)`)
  .option('--roles <list>', `what this process does, of ${ROLES.join(',')} (default: all)`)
  .action(async (options: { config?: string; roles?: string }) => {
    // All is closed by now: no timer that a library still holds keeps the process.
    process.exit(await run(options));
  });

/** Runs until SIGTERM or SIGINT; a second signal ends it at once. */
async function run(options: { config?: string; roles?: string }): Promise<number> {
  const env = { ...process.env, ...(options.roles === undefined ? {} : { HOLDFAST_ROLES: options.roles }) };
  try {
    const config = await loadConfig({ file: options.config ?? process.env['HOLDFAST_CONFIG'], env });
    const logger = createLogger(config.log.level);
    const stopped = waitForSignal();
    await using app = await startApp(config, logger);
    logger.info(
      { url: app.api?.url, roles: config.roles, adminTokenFile: app.adminTokenFile, pid: process.pid },
      'holdfastd is ready',
    );
    logger.info({ signal: await stopped }, 'holdfastd is stopping');
    return 0;
  } catch (error) {
    const { code, remedy } = reportFailure('holdfastd', error);
    process.stderr.write(`${remedy}\n`);
    return code === 'CONFIG_INVALID' ? EXIT_CONFIG : EXIT_FAILED;
  }
}

await program.parseAsync();
