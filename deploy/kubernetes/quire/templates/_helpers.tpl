{{- define "quire.fullname" -}}
{{- if contains "quire" .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}{{ printf "%s-quire" (.Release.Name | trunc 46 | trimSuffix "-") }}{{ end }}
{{- end }}

{{- define "quire.selector" -}}
app.kubernetes.io/name: quire
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "quire.labels" -}}
{{ include "quire.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "quire.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "quire.secret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-keys" (include "quire.fullname" .)) }}
{{- end }}

{{- /* The Secret's entry that holds the keys; nothing where there are none. */}}
{{- define "quire.keysEntry" -}}
{{- with .Values.auth }}
{{- if .existingSecret }}{{ .existingSecretEntry }}{{ else if .keys }}api-keys{{ else if .namedKeys }}keys.yaml{{ end }}
{{- end }}
{{- end }}

{{- define "quire.claim" -}}
{{- .Values.cache.existingClaim | default (printf "%s-cache" (include "quire.fullname" .)) }}
{{- end }}

{{- define "quire.autoscaled" -}}
{{- if or .Values.autoscaling.hpa.enabled .Values.autoscaling.keda.enabled }}true{{ end }}
{{- end }}

{{- /* Whether a model has to be loaded from the hub: OWNER/NAME is an id there. */}}
{{- define "quire.downloads" -}}
{{- if eq (toString .Values.networkPolicy.downloads) "auto" }}
{{- $draft := ternary (get .Values.options "speculative-model") "" (eq (get .Values.options "speculative-method") "draft") }}
{{- range list .Values.model $draft }}
{{- if regexMatch "^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$" (toString .) }}true{{ end }}
{{- end }}
{{- else if .Values.networkPolicy.downloads }}true{{ end }}
{{- end }}

{{- /* Everything that quire serve is told in its --config. The ports stand on the command line: the image's environment
       names one, and would win over a file. */}}
{{- define "quire.options" -}}
{{- $options := deepCopy .Values.options }}
{{- $_ := set $options "drain-timeout" .Values.drain.timeoutSeconds }}
{{- $_ := set $options "live-page" .Values.livePage }}
{{- $entry := include "quire.keysEntry" . }}
{{- if eq $entry "api-keys" }}{{ $_ := set $options "api-key-file" "/etc/quire/keys/api-keys" }}{{ end }}
{{- if eq $entry "keys.yaml" }}{{ $_ := set $options "api-keys-file" "/etc/quire/keys/keys.yaml" }}{{ end }}
{{- if .Values.auth.insecureNoAuth }}{{ $_ := set $options "insecure-no-auth" true }}{{ end }}
{{- if .Values.inferencePool.enabled }}{{ $_ := set $options "vllm-metrics" true }}{{ end }}
{{- toYaml $options }}
{{- end }}

{{- /* Values that are each right and together are not: one line that names them, what they are, and the way out. */}}
{{- define "quire.check" -}}
{{- $auth := .Values.auth }}
{{- $ways := 0 }}
{{- range list $auth.keys $auth.namedKeys $auth.existingSecret $auth.insecureNoAuth }}{{ if . }}{{ $ways = add $ways 1 }}{{ end }}{{ end }}
{{- if ne (int $ways) 1 }}
{{- fail (printf "auth: %d of keys, namedKeys, existingSecret and insecureNoAuth are set; set exactly one" (int $ways)) }}
{{- end }}
{{- $written := dict
      "port" "service.port"
      "health-port" "service.healthPort"
      "host" "nothing: in a pod it is 0.0.0.0"
      "drain-timeout" "drain.timeoutSeconds"
      "api-key" "auth.keys"
      "api-key-file" "auth.existingSecret"
      "api-keys-file" "auth.namedKeys or auth.existingSecret"
      "insecure-no-auth" "auth.insecureNoAuth"
      "live-page" "livePage"
      "model" "model"
      "config" "options" }}
{{- range $name, $value := $written }}
{{- if hasKey $.Values.options $name }}
{{- fail (printf "options.%s is %v: the chart writes it; set %s" $name (index $.Values.options $name) $value) }}
{{- end }}
{{- end }}
{{- if eq (int .Values.service.port) (int .Values.service.healthPort) }}
{{- fail (printf "service.healthPort is %d, as service.port is: give it another port" (int .Values.service.port)) }}
{{- end }}
{{- $scale := .Values.autoscaling }}
{{- if and $scale.hpa.enabled $scale.keda.enabled }}
{{- fail "autoscaling.hpa.enabled and autoscaling.keda.enabled are both true, and both set the replicas: enable one" }}
{{- end }}
{{- if gt (int $scale.minReplicas) (int $scale.maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas is %d, above maxReplicas, %d" (int $scale.minReplicas) (int $scale.maxReplicas)) }}
{{- end }}
{{- if and $scale.hpa.enabled (eq (int $scale.minReplicas) 0) }}
{{- fail "autoscaling.minReplicas is 0: an HPA keeps at least 1; for zero enable keda" }}
{{- end }}
{{- $autoscaled := include "quire.autoscaled" . }}
{{- $several := or (and (not $autoscaled) (gt (int .Values.replicas) 1)) (and $autoscaled (gt (int $scale.maxReplicas) 1)) }}
{{- if and .Values.cache.persistence (ne .Values.cache.accessMode "ReadWriteMany") $several }}
{{- $mode := .Values.cache.accessMode }}
{{- fail (printf "cache.accessMode is %s and there may be several replicas: use ReadWriteMany, or cache.persistence false" $mode) }}
{{- end }}
{{- if and .Values.cache.existingClaim (not .Values.cache.persistence) }}
{{- fail (printf "cache.existingClaim is %s and cache.persistence is false: set cache.persistence true" .Values.cache.existingClaim) }}
{{- end }}
{{- $moves := list (toString .Values.strategy.maxSurge) (toString .Values.strategy.maxUnavailable) }}
{{- if and (has (first $moves) (list "0" "0%")) (has (last $moves) (list "0" "0%")) }}
{{- fail "strategy.maxSurge and strategy.maxUnavailable are both 0, so no replica could ever be replaced: set one to 1" }}
{{- end }}
{{- if and .Values.inferencePool.enabled (not .Values.inferencePool.endpointPicker) }}
{{- fail "inferencePool.endpointPicker is empty: name the Service of the endpoint picker" }}
{{- end }}
{{- end }}
