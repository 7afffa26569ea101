import { Command } from 'commander';
import { reportFailure, waitForSignal } from '../lib/entry-point.js';
import { createLogger } from '../lib/log.js';
import { checkExports } from './check.js';
import { DEFAULT_CONFIG_FILE, loadExportdConfig } from './config.js';
import { startExportd } from './exportd.js';

/** Documented in docs/reference/exportd.md. */
const EXIT_FAILED = 1;
const EXIT_CONFIG = 2;

// Before anything else: until somebody listens, SIGHUP ends a process.
let isReloadAsked = false;
let reload = (): void => {
  isReloadAsked = true;
};
process.on('SIGHUP', () => {
  reload();
});

const program = new Command('holdfast-exportd')
  .description('Serves the exports of a directory over NBD; SIGHUP has it read again')
  .option('--config <file>', `configuration file (default: ${DEFAULT_CONFIG_FILE} if it is there)`)
  .option('--check', 'check the configuration and the export files, and end')
  .action(async (options: { config?: string; check?: true }) => {
    process.exit(await run(options));
  });

/** Runs until SIGTERM or SIGINT; a second signal ends it at once. */
async function run(options: { config?: string; check?: true }): Promise<number> {
  try {
    const config = await loadExportdConfig(options.config);
    if (options.check === true) {
      const { files, problems } = await checkExports(config);
      process.stdout.write([...problems, `${files} files, ${problems.length} problems`, ''].join('\n'));
      return problems.length === 0 ? 0 : EXIT_FAILED;
    }
    const logger = createLogger(config.log.level);
    const stopped = waitForSignal();
    await using exportd = await startExportd(config, logger);
    reload = exportd.reload;
    if (isReloadAsked) reload();
    logger.info({ exportsDirectory: config.exportsDirectory }, 'holdfast-exportd is ready');
    const signal = await Promise.race([stopped, exportd.failed]);
    logger.info({ signal }, 'holdfast-exportd is stopping');
    return 0;
  } catch (error) {
    const { code } = reportFailure('holdfast-exportd', error);
    return code === 'CONFIG_INVALID' ? EXIT_CONFIG : EXIT_FAILED;
  }
}

await program.parseAsync();
