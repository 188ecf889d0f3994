/* A stand-in for libnvidia-ml.so.1, driven by a script, for testing through the real ctypes binding.
 *
 * $NVML_STUB_SCRIPT names a file of key=value lines that is read again at every call. Keys, for GPU i:
 *   devices=2                 gpu0.uuid=GPU-…           gpu0.name=…
 *   temperature=60            gpu1.temperature=95       a key with gpuI. in front wins over the bare one
 *   err.NAME=15               gpu0.err.NAME=15          gpu0.err=15 (every call on that device)
 *   sleep_ms.NAME=30000       field.230=1               field_type.194=5          field_err.230=3
 *   xids=79:0,31:-            delivered once each, in their order; "-" is a device that the driver does not name
 *   processes=100:1024,200:2048
 * NAME is the symbol. A sensor whose key is absent answers NOT_SUPPORTED, as real devices do.
 *
 * Like the real one it is not fork-safe, and strictly so: handles and initialisation are good for one process id, and
 * a further nvmlInit only counts up. $NVML_STUB_LOG, when set, receives one line "pid NAME" per call.
 * Compiled with -DOLD_DRIVER it lacks the symbols that drivers before 535 lack.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, SMALL = 7, TIMED_OUT = 10,
       BAD_VERSION = 25 };
enum { GPUS = 16, PARTS = 8 };

typedef struct { int gpu, part, pid; } Handle; /* part is -1 for the whole GPU */
typedef unsigned long long u64;
typedef union { double d; unsigned ui; unsigned long ul; u64 ull; long long sll; int si; unsigned short us; } Number;
typedef struct { unsigned id, scope; long long at, latency; unsigned type; int status; Number value; } Field;
typedef struct { void *device; u64 type, data; unsigned gpu_instance, compute_instance; } Event;
typedef struct { u64 total, free, used; } MemoryV1;
typedef struct { unsigned version; u64 total, reserved, free, used; } MemoryV2;
typedef struct { unsigned version, sensor; int temperature; } TemperatureV1;
typedef struct { unsigned version; int margin; } MarginV1;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } Process;

static Handle handles[GPUS][PARTS + 1];
static int initialised_pid, references, xids_delivered;

/* -- the script ---------------------------------------------------------------------------------------------- */

static int text_of(const char *key, char *out, size_t size) {
    const char *path = getenv("NVML_STUB_SCRIPT");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return 0;
    char line[1024];
    size_t length = strlen(key);
    int found = 0;
    while (!found && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, length) || line[length] != '=') continue;
        line[strcspn(line, "\r\n")] = 0;
        snprintf(out, size, "%s", line + length + 1);
        found = 1;
    }
    fclose(file);
    return found;
}

static int text_for(int gpu, char *out, size_t size, const char *format, ...) {
    char key[256], own[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(key, sizeof key, format, arguments);
    va_end(arguments);
    if (gpu >= 0) {
        snprintf(own, sizeof own, "gpu%d.%s", gpu, key);
        if (text_of(own, out, size)) return 1;
    }
    return text_of(key, out, size);
}

static int number_for(int gpu, double *out, const char *key) {
    char text[256];
    if (!text_for(gpu, text, sizeof text, "%s", key)) return 0;
    *out = atof(text);
    return 1;
}

static int script_error(int gpu, const char *name) {
    char text[64];
    if (gpu >= 0) {
        char key[32];
        snprintf(key, sizeof key, "gpu%d.err", gpu);
        if (text_of(key, text, sizeof text)) return atoi(text);
    }
    return text_for(gpu, text, sizeof text, "err.%s", name) ? atoi(text) : OK;
}

/* What happens to every call before it does anything: log, scripted delay, scripted error, validity. */
static int enter(const char *name, void *device) {
    Handle *handle = device;
    int gpu = handle ? handle->gpu : -1;
    const char *log = getenv("NVML_STUB_LOG");
    FILE *file = log ? fopen(log, "a") : NULL;
    char text[64];
    if (file) { fprintf(file, "%d %s\n", (int)getpid(), name); fclose(file); }
    if (text_for(gpu, text, sizeof text, "sleep_ms.%s", name)) {
        struct timespec delay = { atol(text) / 1000, atol(text) % 1000 * 1000000L };
        nanosleep(&delay, NULL);
    }
    int error = script_error(gpu, name);
    if (error) return error;
    if (strcmp(name, "nvmlInitWithFlags") && (!references || initialised_pid != (int)getpid())) return UNINITIALIZED;
    return handle && handle->pid != (int)getpid() ? INVALID : OK;
}

#define ENTER(device) do { int status_ = enter(__func__, device); if (status_) return status_; } while (0)

static int sensor(const char *name, void *device, const char *key, double *out) {
    int status = enter(name, device);
    if (status) return status;
    return number_for(((Handle *)device)->gpu, out, key) ? OK : NOT_SUPPORTED;
}

#define SENSOR(symbol, type, key) \
    int symbol(void *device, type *out) { \
        double value; \
        int status = sensor(#symbol, device, key, &value); \
        if (!status) *out = (type)value; \
        return status; \
    }

/* -- library and devices ------------------------------------------------------------------------------------- */

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    ENTER(NULL);
    if (!references++) initialised_pid = (int)getpid();
    return OK;
}

int nvmlShutdown(void) {
    int status = enter(__func__, NULL);
    if (references) references--; /* also in a forked child, where it is the only way to initialise anew */
    return status;
}

const char *nvmlErrorString(int code) { (void)code; return "an error of the stand-in"; }

static int count(void) { double n; return number_for(-1, &n, "devices") ? (int)n : 0; }

static void *handle_of(int gpu, int part) {
    Handle *handle = &handles[gpu][part + 1];
    *handle = (Handle){ gpu, part, (int)getpid() };
    return handle;
}

static void uuid_of(int gpu, int part, char *out, size_t size) {
    char key[64];
    if (part < 0) snprintf(key, sizeof key, "gpu%d.uuid", gpu);
    else snprintf(key, sizeof key, "gpu%d.mig%d.uuid", gpu, part);
    if (!text_of(key, out, size)) snprintf(out, size, part < 0 ? "GPU-%d" : "MIG-%d-%d", gpu, part);
}

static int parts_of(int gpu) { double n; return number_for(gpu, &n, "mig_count") ? (int)n : 0; }

int nvmlSystemGetDriverVersion(char *out, unsigned size) {
    ENTER(NULL);
    char text[80];
    snprintf(out, size, "%s", text_of("driver_version", text, sizeof text) ? text : "570.00");
    return OK;
}

int nvmlSystemGetCudaDriverVersion_v2(int *out) { ENTER(NULL); *out = 12080; return OK; }

int nvmlDeviceGetCount_v2(unsigned *out) { ENTER(NULL); *out = (unsigned)count(); return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    ENTER(NULL);
    if ((int)index >= count()) return INVALID;
    int error = script_error((int)index, __func__);
    if (error) return error;
    *out = handle_of((int)index, -1);
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    ENTER(NULL);
    for (int gpu = 0; gpu < count(); gpu++)
        for (int part = -1; part < parts_of(gpu); part++) {
            char own[96];
            uuid_of(gpu, part, own, sizeof own);
            if (strcmp(own, uuid)) continue;
            int error = script_error(gpu, __func__);
            if (error) return error;
            *out = handle_of(gpu, part);
            return OK;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *device, char *out, unsigned size) {
    ENTER(device);
    uuid_of(((Handle *)device)->gpu, ((Handle *)device)->part, out, size);
    return OK;
}

int nvmlDeviceGetName(void *device, char *out, unsigned size) {
    ENTER(device);
    char text[96];
    int named = text_for(((Handle *)device)->gpu, text, sizeof text, "name");
    snprintf(out, size, "%s", named ? text : "Stand-in GPU");
    return OK;
}

int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    double value;
    int status = sensor(__func__, device, "mig", &value);
    if (!status) *current = *pending = (unsigned)value;
    return status;
}

int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *out) { ENTER(device); *out = PARTS - 1; return OK; }

int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **out) {
    ENTER(device);
    int gpu = ((Handle *)device)->gpu;
    if ((int)index >= parts_of(gpu)) return NOT_FOUND;
    *out = handle_of(gpu, (int)index);
    return OK;
}

int nvmlDeviceGetGpuInstanceId(void *device, unsigned *out) {
    ENTER(device);
    *out = (unsigned)((Handle *)device)->part + 1;
    return OK;
}

int nvmlDeviceGetComputeInstanceId(void *device, unsigned *out) { ENTER(device); *out = 0; return OK; }

/* -- sensors ------------------------------------------------------------------------------------------------- */

int nvmlDeviceGetTemperature(void *device, unsigned sensor_type, unsigned *out) {
    double value;
    int status = sensor(__func__, device, "temperature", &value);
    if (!status) *out = (unsigned)value;
    return sensor_type ? NOT_SUPPORTED : status;
}

int nvmlDeviceGetTemperatureThreshold(void *device, unsigned which, unsigned *out) {
    static const char *keys[] = { "shutdown", "slowdown", "memory_max", "gpu_max" };
    double value;
    int status = which > 3 ? INVALID : sensor(__func__, device, keys[which], &value);
    if (!status) *out = (unsigned)value;
    return status;
}

static int memory(const char *name, void *device, u64 *total, u64 *reserved, u64 *used) {
    double value, kept = 0;
    Handle *handle = device;
    char key[64];
    int status = sensor(name, device, "memory_total", &value);
    if (status) return status;
    *total = (u64)value;
    number_for(handle->gpu, &kept, "memory_reserved");
    number_for(handle->gpu, &value, "memory_used");
    *reserved = (u64)kept;
    *used = (u64)value;
    if (handle->part < 0) return OK;
    snprintf(key, sizeof key, "mig%d.memory_total", handle->part);
    if (number_for(handle->gpu, &value, key)) *total = (u64)value;
    snprintf(key, sizeof key, "mig%d.memory_used", handle->part);
    if (number_for(handle->gpu, &value, key)) *used = (u64)value;
    return OK;
}

int nvmlDeviceGetMemoryInfo(void *device, MemoryV1 *out) {
    u64 reserved;
    int status = memory(__func__, device, &out->total, &reserved, &out->used);
    out->used += status ? 0 : reserved;
    out->free = out->total - out->used;
    return status;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(void *device, MemoryV2 *out) {
    if (out->version != 0x02000028) return BAD_VERSION;
    int status = memory(__func__, device, &out->total, &out->reserved, &out->used);
    out->free = out->total - out->used - out->reserved;
    return status;
}

int nvmlDeviceGetTemperatureV(void *device, TemperatureV1 *out) {
    double value;
    if (out->version != 0x100000C) return BAD_VERSION;
    int status = sensor(__func__, device, "temperature", &value);
    if (!status) out->temperature = (int)value;
    return status;
}

int nvmlDeviceGetMarginTemperature(void *device, MarginV1 *out) {
    double value;
    if (out->version != 0x1000008) return BAD_VERSION;
    int status = sensor(__func__, device, "margin", &value);
    if (!status) out->margin = (int)value;
    return status;
}

SENSOR(nvmlDeviceGetCurrentClocksEventReasons, u64, "reasons")
#endif

SENSOR(nvmlDeviceGetCurrentClocksThrottleReasons, u64, "reasons")
SENSOR(nvmlDeviceGetPowerUsage, unsigned, "power_mw")
SENSOR(nvmlDeviceGetEnforcedPowerLimit, unsigned, "power_limit_mw")
SENSOR(nvmlDeviceGetPcieReplayCounter, unsigned, "pcie_replays")

int nvmlDeviceGetUtilizationRates(void *device, Utilization *out) {
    double value;
    int status = sensor(__func__, device, "utilization", &value);
    if (!status) out->gpu = out->memory = (unsigned)value;
    return status;
}

int nvmlDeviceGetTotalEccErrors(void *device, unsigned kind, unsigned counter, u64 *out) {
    double value;
    int status = sensor(__func__, device, counter ? "ecc_aggregate" : "ecc_volatile", &value);
    if (!status) *out = kind == 1 ? (u64)value : 0;
    return status;
}

int nvmlDeviceGetRemappedRows(void *device, unsigned *corrected, unsigned *uncorrected, unsigned *pending,
                              unsigned *failed) {
    char text[64];
    ENTER(device);
    if (!text_for(((Handle *)device)->gpu, text, sizeof text, "rows")) return NOT_SUPPORTED;
    return sscanf(text, "%u,%u,%u,%u", corrected, uncorrected, pending, failed) == 4 ? OK : INVALID;
}

int nvmlDeviceGetFieldValues(void *device, int n, Field *fields) {
    ENTER(device);
    int gpu = ((Handle *)device)->gpu;
    for (Field *field = fields; field < fields + n; field++) {
        char text[64];
        field->value.ull = 0; /* a careless reader would take this for "none", or for 0 °C */
        field->type = 1;
        field->status = NOT_SUPPORTED;
        if (text_for(gpu, text, sizeof text, "field_err.%u", field->id)) { field->status = atoi(text); continue; }
        if (!text_for(gpu, text, sizeof text, "field.%u", field->id)) continue;
        double value = atof(text);
        field->status = OK;
        if (text_for(gpu, text, sizeof text, "field_type.%u", field->id)) field->type = (unsigned)atoi(text);
        switch (field->type) {
        case 0: field->value.d = value; break;
        case 4: field->value.sll = (long long)value; break;
        case 5: field->value.si = (int)value; break;
        case 6: field->value.us = (unsigned short)value; break;
        default: field->value.ui = (unsigned)(int)value; break;
        }
    }
    return OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *n, Process *out) {
    ENTER(device);
    char text[512];
    Process found[32];
    unsigned size = 0;
    if (!text_for(((Handle *)device)->gpu, text, sizeof text, "processes")) return NOT_SUPPORTED;
    for (char *rest = text, *one; (one = strsep(&rest, ",")) && size < 32;) {
        Process process = { 0, ~0ULL, ~0u, ~0u };
        if (sscanf(one, "%u:%llu", &process.pid, &process.used) >= 1) found[size++] = process;
    }
    unsigned room = *n;
    *n = size;
    if (!size) return OK;
    if (!out || room < size) return SMALL;
    memcpy(out, found, size * sizeof *out);
    return OK;
}

/* -- events -------------------------------------------------------------------------------------------------- */

int nvmlEventSetCreate(void **out) { ENTER(NULL); *out = &xids_delivered; return OK; }
int nvmlEventSetFree(void *set) { (void)set; return OK; }

int nvmlDeviceRegisterEvents(void *device, u64 types, void *set) {
    (void)set;
    ENTER(device);
    return types & 0x8 ? OK : NOT_SUPPORTED;
}

int nvmlEventSetWait_v2(void *set, Event *out, unsigned timeout_ms) {
    (void)set;
    ENTER(NULL);
    char text[512], whose[16];
    int place = 0, code;
    if (text_of("xids", text, sizeof text))
        for (char *rest = text, *one; (one = strsep(&rest, ","));) {
            if (sscanf(one, "%d:%15s", &code, whose) != 2 || place++ < xids_delivered) continue;
            xids_delivered++;
            memset(out, 0, sizeof *out);
            out->device = *whose == '-' ? NULL : handle_of(atoi(whose), -1);
            out->type = 0x8;
            out->data = (u64)code;
            return OK;
        }
    struct timespec delay = { timeout_ms / 1000, timeout_ms % 1000 * 1000000L };
    nanosleep(&delay, NULL);
    return TIMED_OUT;
}
